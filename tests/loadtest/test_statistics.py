"""Quantiles with their intervals, limits, summaries, noise."""

from __future__ import annotations

import math
import random

import pytest

from llamaherd_loadtest.health import Health
from llamaherd_loadtest.limits import observe, parse_limit
from llamaherd_loadtest.quantiles import estimate, quantile
from llamaherd_loadtest.samples import Sample
from llamaherd_loadtest.summary import summarise
from llamaherd_loadtest.tune.evidence import student_t

WELL = Health(cpu=0.1, lag_p95_s=0.001)


@pytest.mark.parametrize(("p", "enough"), [(0.95, 72), (0.99, 368), (0.5, 6)])
def test_an_interval_needs_enough_values(p: float, enough: int) -> None:
    assert estimate([float(i) for i in range(enough)], p).resolved
    assert not estimate([float(i) for i in range(enough - 1)], p).resolved


@pytest.mark.parametrize(("n", "p"), [(100, 0.95), (25, 0.5), (20000, 0.95)])
def test_intervals_cover_the_truth_as_often_as_they_say(n: int, p: float) -> None:
    dice = random.Random(1)
    covered = 0
    for _ in range(200):
        found = estimate(sorted(dice.random() for _ in range(n)), p)
        assert found.low is not None and found.high is not None
        covered += found.low <= p <= found.high
    assert covered >= 0.91 * 200


def test_quantiles_lie_between_neighbours() -> None:
    assert quantile([1.0, 2.0, 4.0], 0.5) == 2.0
    assert quantile([1.0, 2.0, 4.0], 0.75) == 3.0
    assert quantile([7.0], 0.95) == 7.0


def test_students_t_is_the_tables() -> None:
    for freedom, value in ((4, 2.776), (10, 2.228), (30, 2.042)):
        assert math.isclose(student_t(0.975, freedom), value, rel_tol=0.005)


def test_limits_are_read_and_held_against_samples() -> None:
    limit = parse_limit("ttft_p95=2s")
    assert (limit.metric, limit.p, limit.ms) == ("ttft", 0.95, 2000.0)
    assert parse_limit("gap_max=150.5ms").p == 1.0
    done = [Sample(index=i, scheduled=0.0, first=0.1 * i, last=0.1 * i, end=1.0) for i in range(1, 12)]
    failed = Sample(index=99, scheduled=0.0, first=50.0, outcome="timeout")
    assert observe(limit, [*done, failed]) == pytest.approx(1050)
    assert observe(limit, [failed]) is None


@pytest.mark.parametrize("text", ["ttft=2s", "ttft_p95", "ttft_p95=2", "speed_p95=2s", "ttft_p95=-1s"])
def test_limits_that_make_no_sense_are_named(text: str) -> None:
    with pytest.raises(ValueError, match=f"{text}.*write for example ttft_p95=2s"):
        parse_limit(text)


def stream(start: float, first: float, gaps: list[float], **fields: object) -> Sample:
    end = first + sum(gaps)
    return Sample(index=0, scheduled=start, sent=start, first=first, last=end, end=end, gaps=gaps, **fields)  # type: ignore[arg-type]


def test_only_the_full_load_window_counts() -> None:
    warm = stream(0.0, 1.0, [1.0] * 3, warmup=True)  # tokens at 1, 2, 3, 4
    inside = stream(4.0, 5.0, [1.0] * 3)  # at 5, 6, 7, 8
    cut = stream(8.0, 9.0, [1.0], outcome="cut_off")  # at 9, 10
    failed = Sample(index=0, scheduled=6.0, sent=6.0, end=7.0, outcome="http 429")
    result = summarise([warm, inside, cut, failed], 3.5, 9.5, WELL)
    assert result.output_tokens_per_s == pytest.approx((1 + 4 + 1) / 6)
    assert (result.requests, result.errors, result.cut_off) == (1, {"http 429": 1}, 1)
    assert result.ttft is not None and result.ttft.mean == pytest.approx(1000)
    assert result.tpot is not None and result.tpot.mean == pytest.approx(1000)
    assert result.largest_gap is not None and result.largest_gap.max == pytest.approx(1000)


def test_schedule_delay_is_reported_beside_ttft() -> None:
    late = stream(0.0, 3.0, [0.1])
    late.sent = 2.0
    result = summarise([late], 0.0, 10.0, WELL)
    assert result.ttft is not None and result.ttft.mean == pytest.approx(3000)
    assert result.schedule_delay is not None and result.schedule_delay.mean == pytest.approx(2000)


def test_several_tokens_in_an_event_are_called_so() -> None:
    grouped = stream(0.0, 1.0, [1.0] * 4, completion_tokens=20)
    result = summarise([grouped], 0.0, 10.0, WELL)
    assert result.inter_chunk
    assert result.output_tokens_per_s == pytest.approx(2.0)
    assert result.tpot is not None and result.tpot.mean == pytest.approx(4000 / 19)


@pytest.mark.parametrize(
    ("health", "reason"),
    [
        (Health(cpu=0.97, lag_p95_s=0.001), "97% of its core"),
        (Health(cpu=0.1, lag_p95_s=0.2), "200 ms late"),
        (Health(cpu=0.1, lag_p95_s=0.001, concurrency=0.5), "only 50% of the requested concurrency"),
    ],
)
def test_a_run_whose_client_was_the_bottleneck_says_so(health: Health, reason: str) -> None:
    assert reason in summarise([], 0.0, 1.0, health).fault
    assert summarise([], 0.0, 1.0, WELL).fault == ""
