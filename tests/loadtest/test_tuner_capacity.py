"""How much load settings carry: doubling and bisection, three-valued."""

from __future__ import annotations

import math
import re

import pytest

from llamaherd_loadtest.quantiles import Judgement
from llamaherd_loadtest.tune.capacity import Capacity, find_capacity, settle
from llamaherd_loadtest.tune.evidence import Measurement, Record
from llamaherd_loadtest.tune.judge import judge

from .simulated import CURRENT, LIMITS, SimulatedServer, search


@pytest.mark.parametrize("truth", [1, 5, 11, 16])
def test_finds_the_highest_load_that_passes(truth: int) -> None:
    tried: list[int] = []

    def measure(load: int) -> Judgement:
        tried.append(load)
        return Judgement.PASSES if load <= truth else Judgement.MISSES

    assert find_capacity(measure, slots=8) == Capacity(truth, truth + 1)
    assert len(tried) == len(set(tried)) <= 10


def test_loads_that_all_pass_or_all_miss_say_so() -> None:
    never, always = (find_capacity(lambda _, j=j: j, slots=4) for j in (Judgement.MISSES, Judgement.PASSES))  # type: ignore[misc]
    assert (never, always) == (Capacity(0, 1), Capacity(16, None))
    assert str(never) == "not even one request in flight keeps the limits"
    assert find_capacity(lambda _: None, slots=4) is None


def test_unresolved_loads_are_measured_longer_and_then_do_not_pass() -> None:
    windows = [Measurement(took_s=1.0, requests=50, observed={"ttft_p95": LIMITS[0].ms * 0.95}) for _ in range(4)]

    def decide(noise: float) -> tuple[Judgement | None, int]:
        given: list[Measurement] = []

        def measure() -> Measurement:
            given.append(windows[len(given)])
            return given[-1]

        def judged(seen: list[Measurement]) -> Judgement:
            excess = (LIMITS[0], math.log(0.95), noise / math.sqrt(len(seen)))
            return judge(Record(CURRENT, screening=seen), [excess])[0]

        return settle(measure, judged), len(given)

    near = -math.log(0.95) / 1.645
    assert decide(0.9 * near) == (Judgement.PASSES, 1)
    assert decide(1.3 * near) == (Judgement.PASSES, 2)
    assert decide(9 * near) == (Judgement.UNRESOLVED, 3)


def test_a_search_measures_the_capacity_within_its_time() -> None:
    server = SimulatedServer(3)
    tried = search(server, CURRENT, budget_s=900, seed=3)
    chosen = tried.run().record.settings
    before = tried.spent_s
    found = tried.capacity(chosen, 1200)
    assert found is not None and found.keeps >= 1
    assert tried.spent_s - before <= 1200
    assert found.arrivals is Judgement.PASSES
    assert re.search(r"; \S+ requests/s that arrive at random keep them$", str(found))
