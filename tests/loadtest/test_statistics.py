"""Quantiles with their intervals, limits, summaries, noise."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import gevent
import pytest

from llamaherd_loadtest.client import clock
from llamaherd_loadtest.health import Health, HealthMonitor
from llamaherd_loadtest.limits import judge_errors, observe, parse_limit, parse_limits
from llamaherd_loadtest.merged_run import Part, merge
from llamaherd_loadtest.quantiles import Judgement, estimate, judge_share, quantile, share, unbiased_quantile
from llamaherd_loadtest.samples import Sample
from llamaherd_loadtest.summary import in_words, summarise
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


def test_shares_have_intervals_and_are_judged_by_them() -> None:
    one = share(1, 81)
    assert one is not None
    assert (one.value, one.low, one.high) == pytest.approx((0.0123, 0.0022, 0.0667), abs=1e-4)
    assert share(0, 0) is None
    assert [judge_share(0, n, 0.05) for n in (71, 72)] == [Judgement.UNRESOLVED, Judgement.PASSES], "as p95's interval"
    assert [judge_share(k, 81, 0.05) for k in (8, 9)] == [Judgement.UNRESOLVED, Judgement.MISSES]
    assert judge_share(4900, 100_000, 0.05) is judge_share(5100, 100_000, 0.05) is Judgement.UNRESOLVED
    assert judge_share(4800, 100_000, 0.05) is Judgement.PASSES
    assert [judge_errors(k, 81) for k in range(4)] == [Judgement.PASSES, *[Judgement.UNRESOLVED] * 2, Judgement.MISSES]


@pytest.mark.parametrize(
    ("draw", "truth"),
    [
        (lambda rng: rng.random(), 0.95),
        (lambda rng: rng.expovariate(1.0), -math.log(0.05)),
        (lambda rng: rng.lognormvariate(0.0, 0.3), math.exp(0.3 * 1.645)),
    ],
)
def test_a_quantile_of_few_values_is_not_too_small(draw: Callable[[random.Random], float], truth: float) -> None:
    """A p95 of 8 values reads 0.8 to 0.9 of the truth."""
    rng = random.Random(1)
    windows = [sorted(draw(rng) for _ in range(8)) for _ in range(2000)]
    assert sum(quantile(window, 0.95) for window in windows) / len(windows) < 0.92 * truth
    assert sum(unbiased_quantile(window, 0.95) for window in windows) / len(windows) == pytest.approx(truth, rel=0.1)
    many = sorted(draw(rng) for _ in range(2000))
    assert unbiased_quantile(many, 0.95) == pytest.approx(quantile(many, 0.95), rel=0.01)


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


def test_mlperfs_limits_have_names() -> None:
    ttft, tpot = parse_limits("mlperf-llama2-70b-interactive")
    assert (ttft.name, ttft.ms, tpot.name, tpot.ms) == ("ttft_p99", 450, "tpot_p99", 40)
    with pytest.raises(ValueError, match=r"unknown limit 'mlperf-gpt2'; available: mlperf-llama3\.1-8b"):
        parse_limits("mlperf-gpt2")


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


def test_goodput_counts_what_meets_all_limits_and_errors_as_misses() -> None:
    limits = [parse_limit("ttft_p95=2s"), parse_limit("gap_max=1s")]
    good, slow, stalled = stream(0.0, 1.0, [0.5]), stream(0.0, 3.0, [0.5]), stream(0.0, 1.0, [0.5, 2.0])
    failed = Sample(index=0, scheduled=0.0, end=1.0, outcome="timeout")
    cut = stream(0.0, 1.0, [0.5], outcome="cut_off")
    goodput = summarise([good, slow, stalled, failed, cut], 0.0, 10.0, WELL, limits).goodput
    assert goodput is not None
    assert (goodput.requests_per_s, goodput.attainment) == (0.1, 0.25)
    assert 0 < goodput.low < 0.1
    assert 0.6 < goodput.high < 1
    assert summarise([good], 0.0, 10.0, WELL).goodput is None


def test_requests_in_flight_past_a_limit_are_misses() -> None:
    limits = [parse_limit("ttft_p95=2s"), parse_limit("e2e_p95=8s")]
    good = stream(0.0, 1.0, [0.5])
    no_token = Sample(index=1, scheduled=7.0, sent=7.0, end=10.0, outcome="cut_off")
    too_long = stream(1.0, 2.0, [9.0])  # ends after the window
    in_time = [Sample(index=3, scheduled=9.0, sent=9.0, end=10.0, outcome="cut_off"), stream(5.0, 6.0, [6.0])]
    summary = summarise([good, no_token, too_long, *in_time], 0.0, 10.0, WELL, limits)
    assert summary.goodput is not None
    assert summary.goodput.attainment == pytest.approx(1 / 3)
    assert [(judged.over, judged.of) for judged in summary.judged] == [(1, 2), (1, 2)]
    assert summary.waited_s == pytest.approx(3.0)
    assert "at the end a request had waited 3.0 s for its first token" in in_words(summary)


def test_limits_are_judged_with_the_interval_of_their_share() -> None:
    limits = [parse_limit("ttft_p95=2s")]
    fast, slow = stream(0.0, 1.0, [0.5]), stream(0.0, 3.0, [0.5])
    judged = {
        (n, over): summarise([slow] * over + [fast] * (n - over), 0.0, 10.0, WELL, limits).judged[0].judgement
        for n, over in ((20, 0), (80, 0), (80, 4), (80, 10))
    }
    assert list(judged.values()) == ["unresolved", "passes", "unresolved", "misses"]
    assert "limit ttft_p95 2000 ms: unresolved, 0 of 20 above it" in in_words(
        summarise([fast] * 20, 0.0, 10.0, WELL, limits)
    )


def arrivals(rate: float, capacity: float, until_s: float, seed: int) -> list[Sample]:
    """Poisson arrivals at a server that answers one after the other, `capacity` a second; cut off at the end."""
    rng, at, free, samples = random.Random(seed), 0.0, 0.0, list[Sample]()
    while (at := at + rng.expovariate(rate)) < until_s:
        free = max(at, free) + 1 / capacity
        if free < until_s:
            samples.append(stream(at, free, []))
        else:
            samples.append(Sample(index=0, scheduled=at, sent=at, end=until_s, outcome="cut_off"))
    return samples


def test_arrivals_that_outrun_the_server_are_a_fault() -> None:
    def faults(rate: float, until_s: float = 30.0) -> list[str]:
        runs = (arrivals(rate, 10.0, until_s, seed) for seed in range(40))
        return [summarise(run, 0.0, until_s, WELL, at_once=1).fault for run in runs]

    assert sum(fault.startswith("over-saturated: ") for fault in faults(20.0)) == 40
    assert sum(map(bool, faults(8.0))) == 0
    assert sum(map(bool, faults(9.5))) <= 2
    assert summarise(arrivals(20.0, 10.0, 30.0, 1), 0.0, 30.0, WELL).fault == "", "a closed loop"


def test_failed_requests_are_a_fault_where_chance_does_not_explain_them() -> None:
    good, failed = stream(0.0, 1.0, [0.1]), Sample(index=0, scheduled=0.0, end=1.0, outcome="http 500", detail="no")
    one, many = (summarise([good] * (81 - n) + [failed] * n, 0.0, 2.0, WELL) for n in (1, 11))
    assert one.fault == ""
    assert "1.2% (0.2% to 6.7%) of the requests failed" in in_words(one)
    assert many.fault == "11 of 81 requests failed, most with http 500: no"


def test_prompts_that_a_server_had_computed_before_are_told_of() -> None:
    cold, warm = (stream(0.0, 1.0, [0.1], prompt_tokens=100, cached_tokens=n) for n in (0, 80))
    assert "40% of the prompt tokens came from the server's cache" in in_words(summarise([cold, warm], 0.0, 2.0, WELL))


def test_a_server_that_stops_answering_is_a_fault_and_a_slow_one_is_not() -> None:
    answered = [stream(t / 10, t / 10 + 0.2, [0.1] * 5) for t in range(10)]
    hanging = Sample(index=9, scheduled=2.0, sent=2.0, end=20.0, outcome="cut_off")
    wedged = summarise([*answered, hanging], 0.0, 20.0, WELL).fault
    assert wedged == "the server stopped answering: nothing arrived in the last 18.4 s, 1 in flight"
    slow = [stream(0.0, 7.0, [0.1]), Sample(index=9, scheduled=7.1, sent=7.1, end=20.0, outcome="cut_off")]
    assert summarise(slow, 0.0, 20.0, WELL).fault == ""
    assert summarise([hanging], 0.0, 20.0, WELL).fault.startswith("no request ended within the window of 20.0 s")
    assert merge([part([], start=0.0, end=20.0, users=0, warmed=0)], 0, []).summary.fault == "no request was sent"


def test_requests_that_fail_are_not_blamed_on_the_client() -> None:
    failed = [Sample(index=i, scheduled=0.0, end=1.0, outcome="http 429", detail="slow down") for i in range(3)]
    fault = summarise(
        [*failed, stream(0.0, 1.0, [0.1])], 0.0, 2.0, Health(cpu=0.1, lag_p95_s=0.0, concurrency=0.5)
    ).fault
    assert fault == "3 of 4 requests failed, most with http 429: slow down"


def test_a_late_client_spoils_fast_answers_and_not_slow_ones() -> None:
    late, later = (Health(cpu=0.1, lag_p95_s=lag) for lag in (0.03, 0.2))
    for health, ttft_s, itl_s, spoilt in (
        (late, 0.04, 0.02, True),  # on a fast server its lag is as long as what it measures
        (late, 1.0, 0.1, False),
        (late, 1.0, 0.02, True),
        (later, 1.0, 0.5, True),
        (later, 5.0, 0.1, True),
        (later, 5.0, 0.5, False),
    ):
        fault = summarise([stream(0.0, ttft_s, [itl_s])], 0.0, 10.0, health).fault
        assert fault.startswith("event loop") == spoilt, (health, ttft_s, itl_s)


def test_health_is_that_of_the_window() -> None:
    monitor = HealthMonitor()
    gevent.sleep(0.3)
    start = clock()
    while clock() < start + 0.3:
        gevent.sleep(0)
    end = clock()
    gevent.sleep(0.3)
    cpu = [monitor.stop(since, until)[0] for since, until in ((start, end), (0.0, math.inf))]
    assert cpu[0] > 1.5 * cpu[1]


def test_the_ttft_is_split_where_the_server_tells_its_prefill() -> None:
    told = stream(0.0, 1.0, [0.1], prefill=0.25)
    result = summarise([told, stream(0.0, 5.0, [0.1])], 0.0, 10.0, WELL)
    assert result.prefill is not None and (result.prefill.count, result.prefill.mean) == (1, 250)
    assert result.queue is not None and result.queue.mean == 750
    assert result.queue_share == 0.75


def test_late_sends_and_missing_sockets_are_the_clients_fault() -> None:
    late = stream(0.0, 3.0, [0.1])
    late.sent = 0.4
    assert summarise([late], 0.0, 10.0, WELL).fault.startswith("event loop: requests were sent 400 ms late at p95")
    none_left = Sample(index=0, scheduled=0.0, end=1.0, outcome="client", detail="Too many open files")
    assert summarise([none_left], 0.0, 10.0, WELL).fault.startswith("sockets: Too many open files: raise `ulimit -n`")


def part(samples: list[Sample], **fields: Any) -> Part:
    return Part(samples=samples, **({"epoch": 0.0, "users": 1, "warmed": 1, "cpu": 0.1, "lag_p95_s": 0.0} | fields))


def test_parts_are_brought_onto_one_clock_and_one_window() -> None:
    """The second process's clock is 100 s behind; both ran from 1 to 9 on the first one's, the second from 2 on."""
    one = part([stream(1.0, 2.0, [1.0]), stream(3.0, 9.0, [])], start=1.0, end=9.0)
    two = part([stream(-98.0, -97.0, [1.0])], start=-98.0, end=-92.0, epoch=100.0, cpu=0.5)
    merged = merge([one, two], 0, [])
    assert [(s.scheduled, s.first, s.end) for s in merged.samples] == [(1, 2, 3), (3, 9, 9), (2, 3, 4)]
    assert (merged.summary.window_s, merged.summary.requests, merged.summary.cut_off) == (6.0, 2, 1)
    assert merged.summary.health.cpu == 0.5
    assert merged.summary.health.concurrency == pytest.approx((1 + 5 + 2) / 6 / 2)


def test_a_lost_process_and_a_load_never_full_invalidate_the_run() -> None:
    whole = part([stream(1.0, 2.0, [1.0])], start=1.0, end=9.0)
    assert merge([whole], 1, []).summary.fault.startswith("1 load generators did not report")
    never = part([], start=1.0, end=9.0, users=4, warmed=3)
    assert merge([never], 0, []).summary.fault.startswith("the load was never full: 3 of 4 users")
