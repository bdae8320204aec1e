"""A key's own limits, with a clock of its own."""

from __future__ import annotations

import pytest

from llamaherd_server.auth import ANONYMOUS, Key
from llamaherd_server.errors import ApiError
from llamaherd_server.quota import CRASH_REFUSED_S, CRASH_WINDOW_S, CRASHES, Quotas


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_requests_per_minute_refill_evenly() -> None:
    clock = Clock()
    quotas = Quotas(clock)
    key = Key(name="k", sha256="", requests_per_minute=2)
    for _ in range(2):
        quotas.enter(key)
        quotas.leave(key, 0)
    with pytest.raises(ApiError) as refused:
        quotas.enter(key)
    assert (refused.value.status_code, (refused.value.headers or {})["Retry-After"]) == (429, "30")
    clock.now = 30
    quotas.enter(key)


def test_tokens_per_minute_are_taken_afterwards() -> None:
    clock = Clock()
    quotas = Quotas(clock)
    key = Key(name="k", sha256="", tokens_per_minute=60)
    quotas.enter(key)
    quotas.leave(key, 90)
    with pytest.raises(ApiError, match="60 tokens a minute: try again in 31 s"):
        quotas.enter(key)
    clock.now = 31
    quotas.enter(key)


def test_concurrent_requests_are_counted_out() -> None:
    quotas = Quotas(Clock())
    key = Key(name="k", sha256="", max_concurrent=1)
    quotas.enter(key)
    with pytest.raises(ApiError, match="1 requests at a time"):
        quotas.enter(key)
    quotas.leave(key, 0)
    quotas.enter(key)


def test_keys_do_not_share_an_account() -> None:
    quotas = Quotas(Clock())
    quotas.enter(Key(name="a", sha256="", requests_per_minute=1))
    quotas.enter(Key(name="b", sha256="", requests_per_minute=1))


def test_a_key_at_whose_requests_the_engine_ends_again_and_again_is_refused_for_a_while() -> None:
    clock = Clock()
    quotas = Quotas(clock)
    key, other = Key(name="k", sha256=""), Key(name="other", sha256="")
    for _ in range(CRASHES):
        quotas.enter(key)
        quotas.crashed(key)
        quotas.leave(key, 0)
    quotas.enter(other)
    with pytest.raises(ApiError, match="key 'k'") as refused:
        quotas.enter(key)
    assert (refused.value.status_code, (refused.value.headers or {})["Retry-After"]) == (429, f"{CRASH_REFUSED_S:.0f}")
    clock.now = CRASH_REFUSED_S
    quotas.enter(key)


def test_crashes_that_lie_far_apart_refuse_nobody_nor_do_those_of_clients_without_a_key() -> None:
    clock = Clock()
    quotas = Quotas(clock)
    key = Key(name="k", sha256="")
    for _ in range(3 * CRASHES):
        quotas.crashed(key)
        quotas.crashed(ANONYMOUS)
        clock.now += CRASH_WINDOW_S
        quotas.enter(key)
        quotas.enter(ANONYMOUS)
