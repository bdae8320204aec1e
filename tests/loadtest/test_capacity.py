"""The capacity simulation beside queueing theory, and its answers."""

from __future__ import annotations

import random

import pytest

from llamaherd_loadtest.capacity import Profile, hosts_needed, simulate, users_served
from llamaherd_loadtest.limits import parse_limit


def repairman(users: int, slots: int, think_s: float, service_s: float) -> float:
    """Throughput of M/M/c//N (Kleinrock, Queueing Systems I, 3.8), requests a second, from its birth-death chain."""
    weights = [1.0]
    for n in range(1, users + 1):
        weights.append(weights[-1] * (users - n + 1) / think_s / (min(n, slots) / service_s))
    busy = sum(min(n, slots) * weight for n, weight in enumerate(weights)) / sum(weights)
    return busy / service_s


@pytest.mark.parametrize("users", [2, 8, 20])
def test_a_constant_pace_is_the_machine_repairman(users: int) -> None:
    profile = Profile(parallel=4, prompt_tokens_per_s=1e9, tpot_s={1: 0.05})
    samples = simulate(profile, 1, users, 4.0, lambda rng: (1, 1 + rng.expovariate(1 / 40)), requests=8_000)
    counted = [sample for sample in samples if not sample.warmup]
    rate = (len(counted) - 1) / (counted[-1].end - counted[0].end)
    assert rate == pytest.approx(repairman(users, 4, 4.0, 40 * 0.05), rel=0.05)


def fixed(_: random.Random) -> tuple[float, float]:
    return 100, 41


PROFILE = Profile(parallel=4, prompt_tokens_per_s=1000, tpot_s={1: 0.02, 4: 0.05})


def test_a_lone_request_takes_what_the_profile_says() -> None:
    [sample] = simulate(PROFILE, 1, 1, 1.0, fixed, requests=1)
    assert sample.ttft == pytest.approx(0.1)
    assert sample.tpot == pytest.approx(0.02)


def test_between_measured_loads_the_pace_is_interpolated() -> None:
    assert [PROFILE.tpot(busy) for busy in (1, 2, 4, 8)] == pytest.approx([0.02, 0.03, 0.05, 0.05])


def test_more_users_need_more_hosts_and_one_fewer_misses_the_limit() -> None:
    limits = [parse_limit("ttft_p95=1s")]
    needed = [hosts_needed(PROFILE, users, 10.0, fixed, limits) for users in (10, 30, 60)]
    assert needed == sorted(set(needed))
    assert needed[0] == 1


def test_as_many_users_are_served_as_need_that_many_hosts() -> None:
    limits = [parse_limit("ttft_p95=1s")]
    users = users_served(PROFILE, 2, 10.0, fixed, limits)
    needed = [hosts_needed(PROFILE, count, 10.0, fixed, limits) for count in (users, users + 1)]
    assert needed == [2, 3]


def test_limits_that_no_fleet_can_keep_are_an_error() -> None:
    with pytest.raises(ValueError, match="more hosts do not speed up a request"):
        hosts_needed(PROFILE, 10, 10.0, fixed, [parse_limit("ttft_p95=50ms")])
    with pytest.raises(ValueError, match="more hosts do not speed up a request"):
        users_served(PROFILE, 10, 10.0, fixed, [parse_limit("ttft_p95=50ms")])
