"""What a search makes better: throughputs and latencies, and the loads that they are measured under."""

from __future__ import annotations

import re

import pytest

from llamaherd_loadtest.limits import parse_limit
from llamaherd_loadtest.tune.evidence import SLOTS, Load, Measurement
from llamaherd_loadtest.tune.objective import parse_load, parse_objective
from llamaherd_loadtest.tune.search import Search
from llamaherd_loadtest.tune.settings import Settings
from llamaherd_loadtest.tune.verdict import make_verdict

from .simulated import CURRENT, GRID, LIMITS, SimulatedServer


def test_loads_and_objectives_are_read() -> None:
    assert [parse_load(text) for text in ("", "4", "2.5/s")] == [SLOTS, Load(4), Load(rate=2.5)]
    assert parse_objective("requests", SLOTS).score(50.0, 2.0, None) == 2.0
    assert parse_objective("tokens", Load(8)).score(50.0, 2.0, None) == 50.0
    latency = parse_objective("e2e_p95", Load(4))
    assert latency.limit == parse_limit("e2e_p95=1s")
    assert latency.score(50.0, 2.0, 500.0) == 2.0
    assert latency.in_words(0.25, 0.05) == "e2e_p95 -20% ± 4%"
    assert parse_objective("tokens", SLOTS).in_words(0.25, 0.05) == "+25% ± 5% output tokens/s"


@pytest.mark.parametrize(
    ("objective", "load", "message"),
    [
        ("speed", "4", "invalid objective 'speed': write tokens, requests, or a latency (ttft_p95"),
        ("ttft_p95", "", "objective ttft_p95 needs a load: --load 4 (requests in flight) or --load 2/s"),
        ("tokens", "2/s", "a load of 2/s fixes the throughput"),
        ("tokens", "0", "invalid load '0'"),
        ("tokens", "two", "invalid load 'two'"),
    ],
)
def test_objectives_that_make_no_sense_are_named(objective: str, load: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_objective(objective, parse_load(load))


class Timed:
    """A simulated server whose score is a latency at a given load."""

    def __init__(self, server: SimulatedServer) -> None:
        self.server, self.loads = server, set[Load]()

    def measure(self, settings: Settings, window_s: float, seed: int, load: Load = SLOTS) -> Measurement:
        self.loads.add(load)
        measured = self.server.measure(settings, window_s, seed)
        measured.score = 1000 / measured.observed["ttft_p95"] if measured.observed else 0.0
        return measured


def test_a_search_for_a_latency_lowers_it_at_the_given_load() -> None:
    bench, load = Timed(SimulatedServer(3)), Load(4)
    current = {**CURRENT, "parallel": 12}
    objective = parse_objective("ttft_p95", load)
    others = [settings for settings in GRID if settings != current]
    search = Search(
        [current, *others], LIMITS, always=1, budget_s=1800, bench=bench, seed=3, objective=objective, load=load
    )
    choice = search.run()
    assert choice.change and bench.loads == {load}
    before, after = (bench.server.truth(s)[1]["ttft_p95"] for s in (current, choice.record.settings))
    assert after < 0.5 * before
    verdict = make_verdict(search, choice, [])
    assert ": ttft_p95 -" in verdict.sentence
    assert (verdict.objective, verdict.load) == ("ttft_p95", "4 requests in flight")
    assert verdict.table[0].score == pytest.approx(max(row.score for row in verdict.table if row.confirmed))
