"""How good the tuner's choices are, on simulated servers whose truth is known."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from llamaherd_loadtest.limits import parse_limit
from llamaherd_loadtest.quantiles import Judgement
from llamaherd_loadtest.tune.evidence import SLOTS, Load, Measurement, Record, judge_errors
from llamaherd_loadtest.tune.search import Search
from llamaherd_loadtest.tune.settings import Settings, key
from llamaherd_loadtest.tune.space import candidates, default_space
from llamaherd_loadtest.tune.verdict import make_verdict

from . import simulated_hosts
from .simulated import CURRENT, GRID, LIMITS, SimulatedServer, search

pytestmark = pytest.mark.timeout(1800)  # they only compute, on a busy machine for as long as that takes
SEEDS = range(16)
BUDGET_S = 1800.0


def test_choices_are_near_the_best_and_keep_the_limits() -> None:
    shares, broken = [], 0
    for seed in SEEDS:
        server = SimulatedServer(seed)
        tried = search(server, CURRENT, budget_s=BUDGET_S, seed=seed)
        choice = tried.run()
        assert tried.spent_s <= BUDGET_S
        shares.append(server.truth(choice.record.settings)[0] / server.truth(server.best())[0])
        broken += choice.change and not server.passes(choice.record.settings)
    assert broken <= 1
    assert sum(share >= 0.95 for share in shares) >= 0.7 * len(SEEDS)
    assert sum(share >= 0.90 for share in shares) >= 0.85 * len(SEEDS)


def test_a_quarter_of_an_hour_is_enough_for_thousands_of_settings() -> None:
    """On hosts that drift, whose truth is not of the form that the prior has."""
    near, broken = [], 0
    for seed in range(8):
        host = simulated_hosts.Host(seed, drift=math.log(0.8))
        best = host.best()
        assert best is not None
        tried, choice = simulated_hosts.tune(host, simulated_hosts.CURRENT, budget_s=900.0, seed=seed)
        assert tried is not None and tried.spent_s <= 900.0
        near.append(host.truth(choice)[0] / host.truth(best)[0])
        broken += choice != simulated_hosts.CURRENT and not host.passes(choice)
    assert broken <= 1
    assert sum(share >= 0.9 for share in near) >= 5


def test_keeps_the_current_settings_where_nothing_is_better() -> None:
    for flat in (True, False):
        kept = 0
        for seed in SEEDS:
            server = SimulatedServer(seed, flat=flat)
            current = CURRENT if flat else server.best()
            kept += not search(server, current, budget_s=BUDGET_S / 4, seed=seed).run().change
        assert kept >= 0.95 * len(SEEDS)


def test_a_search_repeats_with_its_seed() -> None:
    first, second = (search(SimulatedServer(7), CURRENT, budget_s=600, seed=7) for _ in range(2))
    assert first.run() == second.run()
    assert first.records == second.records


def test_faults_are_measured_once_and_the_search_goes_on() -> None:
    seed = next(seed for seed in range(100) if not all(map(SimulatedServer(seed).fits, GRID)))
    tried = search(SimulatedServer(seed), CURRENT, budget_s=BUDGET_S, seed=seed)
    choice = tried.run()
    faults = [record for record in tried.records if record.fault]
    launched = [record for record in faults if record.all_windows]
    assert launched
    assert all(len(record.all_windows) == 1 for record in launched)
    assert len(launched) < len(faults), "what needs no less memory is not launched"
    assert not any(SimulatedServer(seed).fits(record.settings) for record in faults)
    assert not choice.record.fault


class Spoiling:
    """A client that is too slow in `share` of the windows, those of the current settings first of all."""

    def __init__(self, server: SimulatedServer, share: float) -> None:
        self._server, self._draw, self._share, self._first = server, random.Random(1), share, True

    def measure(self, settings: Settings, window_s: float, seed: int, load: Load = SLOTS) -> Measurement:
        measured = self._server.measure(settings, window_s, seed, load)
        if self._first or self._draw.random() < self._share:
            measured.fault = measured.fault or "invalid: event loop"
        self._first = False
        return measured


def test_invalid_windows_cost_their_time_and_nothing_else() -> None:
    shares = []
    for seed in SEEDS[:6]:
        server = SimulatedServer(seed)
        tried = search(server, CURRENT, budget_s=BUDGET_S, seed=seed, bench=Spoiling(SimulatedServer(seed), 0.05))
        choice = tried.run()
        assert choice.measured
        shares.append(server.truth(choice.record.settings)[0] / server.truth(server.best())[0])
    assert sum(share >= 0.9 for share in shares) >= 4


def test_settings_that_are_always_spoiled_are_set_aside() -> None:
    tried = search(SimulatedServer(3), CURRENT, budget_s=3000, seed=3, bench=Spoiling(SimulatedServer(3), 1.0))
    choice = tried.run()
    assert (choice.change, choice.measured, choice.reason) == (False, False, "invalid: event loop")
    assert tried.steps > 3, "the current settings are tried for as long as there is time"
    assert make_verdict(tried, choice, []).table[0].verdict == "invalid: event loop"


def test_a_few_failed_requests_say_nothing() -> None:
    class Erring:
        """The current settings fail `errors` of 81 requests; no others are better."""

        def __init__(self, errors: int) -> None:
            self._errors = errors

        def measure(self, settings: Settings, window_s: float, seed: int, load: Load = SLOTS) -> Measurement:
            current = settings == CURRENT
            speed = 100.0 if current else 60.0
            errors = self._errors if current else 0
            return Measurement(
                took_s=1.4 * window_s, score=speed, tokens_per_s=speed, requests=81 - errors, errors=errors
            )

    for errors, changes in ((0, False), (1, False), (20, True)):
        tried = Search([CURRENT, GRID[0]], LIMITS, always=1, budget_s=60, bench=Erring(errors), seed=1)
        assert tried.run().change == changes
    judged = {
        errors: judge_errors([Measurement(took_s=1.0, requests=81 - errors, errors=errors)]) for errors in range(4)
    }
    assert list(judged.values()) == [Judgement.PASSES, Judgement.UNRESOLVED, Judgement.UNRESOLVED, Judgement.MISSES]


def test_limits_that_nothing_meets_keep_the_settings_and_name_the_nearest_miss() -> None:
    strict = [parse_limit("ttft_p95=2s"), parse_limit("tpot_p95=5ms")]
    choice = Search(GRID, strict, always=1, budget_s=900, bench=SimulatedServer(3), seed=3).run()
    assert not choice.change
    assert choice.reason.startswith("no settings keep the limits; the nearest, parallel 1, ")
    assert "misses tpot_p95 by" in choice.reason


def test_settings_that_keep_the_limits_replace_current_ones_that_miss_them() -> None:
    server = SimulatedServer(3)
    miss = next(s for s in reversed(GRID) if server.fits(s) and server.truth(s)[1]["ttft_p95"] > 2 * LIMITS[0].ms)
    choice = search(server, miss, budget_s=BUDGET_S, seed=3).run()
    assert choice.change
    assert choice.reason == "the current settings miss a limit"
    assert server.passes(choice.record.settings)


class Failing:
    """A simulated server on which `fails` says of settings, and of how often they were measured, whether they fail."""

    def __init__(self, server: SimulatedServer, fails: Callable[[Settings, int], bool]) -> None:
        self._server, self._fails, self._seen = server, fails, Counter[str]()

    def measure(self, settings: Settings, window_s: float, seed: int, load: Load = SLOTS) -> Measurement:
        self._seen[key(settings)] += 1
        if self._fails(settings, self._seen[key(settings)]):
            return Measurement(took_s=1.0, fault="failed: no answer")
        return self._server.measure(settings, window_s, seed, load)


def test_current_settings_that_keep_failing_end_the_search() -> None:
    tried = Search(GRID, LIMITS, always=2, budget_s=900, bench=Failing(SimulatedServer(3), lambda *_: True), seed=1)
    choice = tried.run()
    assert (choice.change, choice.reason, tried.steps) == (False, "failed: no answer", 3)


def test_one_failure_rules_nothing_out_and_a_second_one_in_other_company_does() -> None:
    server = SimulatedServer(3)
    best, shares = server.best(), []
    for seed in range(5):
        once = Failing(SimulatedServer(3), lambda settings, n: settings in (CURRENT, best) and n == 1)
        tried = search(server, CURRENT, budget_s=BUDGET_S / 2, seed=seed, bench=once)
        shares.append(server.truth(tried.run().record.settings)[0] / server.truth(best)[0])
        assert not tried.records[0].fault and tried.records[0].confirmed
    assert min(shares) >= 0.9
    always = Failing(SimulatedServer(3), lambda settings, _: settings != CURRENT and settings["ubatch"] == 512)
    tried = search(server, CURRENT, budget_s=BUDGET_S / 2, seed=1, bench=always)
    assert tried.run().record.settings["ubatch"] != 512
    counts = Counter(len(r.all_windows) for r in tried.records[1:] if r.settings["ubatch"] == 512 and r.all_windows)
    assert max(counts) == 2, "and the time goes to others"


def test_a_setting_that_failed_once_is_not_chosen_unless_it_works_again() -> None:
    good, failed = Measurement(took_s=1.0, score=9.0, requests=50), Measurement(took_s=1.0, fault="failed: gone")
    record = Record(CURRENT, screening=[good], confirming=[failed])
    assert record.fault == "" and record.failed_once
    again = replace(failed, valid_before=4)
    assert Record(CURRENT, screening=[good], confirming=[failed, again]).fault == "failed: gone"
    assert Record(CURRENT, screening=[failed, failed]).fault == ""
    assert not Record(CURRENT, screening=[failed, good, good]).failed_once
    assert Record(CURRENT, screening=[replace(failed, does_not_fit=True)]).fault == "failed: gone"


class Slightly:
    """Quiet windows: settings with one value of a knob are 5 % faster than all others, which are alike."""

    def __init__(self, knob: str, value: object) -> None:
        self._knob, self._value, self._draw = knob, value, random.Random(1)

    def measure(self, settings: Settings, window_s: float, seed: int, load: Load = SLOTS) -> Measurement:
        speed = 100.0 * (1.05 if settings.get(self._knob) == self._value else 1.0) * math.exp(self._draw.gauss(0, 0.01))
        observed = {limit.name: limit.ms / 2 * math.exp(self._draw.gauss(0, 0.01)) for limit in LIMITS}
        return Measurement(took_s=1.4 * window_s, score=speed, tokens_per_s=speed, requests=50, observed=observed)


def test_a_quiet_host_shows_small_gains_and_ends_early() -> None:
    space = candidates(CURRENT, {"parallel": [2, 4, 8], "ubatch": [128, 512], "kv_unified": [True, False]})
    adopted, spent, changed = 0, [], 0
    for seed, (knob, value) in enumerate(3 * [("parallel", 8), ("ubatch", 128), ("kv_unified", False)]):
        tried = Search(space, LIMITS, always=1, budget_s=900, bench=Slightly(knob, value), seed=seed)
        adopted += tried.run().record.settings[knob] == value
        spent.append(tried.spent_s / 900)
        changed += Search(space, LIMITS, always=1, budget_s=900, bench=Slightly("", 1), seed=seed).run().change
    assert adopted >= 8
    assert sum(spent) / len(spent) < 0.6
    assert changed == 0


class Gpu:
    """As a GPU is: throughput saturates at about 100 slots, memory ends at `most`."""

    def __init__(self, most: int) -> None:
        self._most, self._draw = most, random.Random(1)

    def measure(self, settings: Settings, window_s: float, seed: int, load: Load = SLOTS) -> Measurement:
        slots = int(settings["parallel"])
        if slots > self._most:
            return Measurement(took_s=1.0, fault="not launched: out of memory", does_not_fit=True)
        speed = 90 * slots / (1 + slots / 100) * math.exp(self._draw.gauss(0, 0.03))
        observed = {"ttft_p95": 100.0 + slots, "tpot_p95": 10 + slots / 20}
        return Measurement(took_s=1.4 * window_s, score=speed, tokens_per_s=speed, requests=50, observed=observed)


def test_the_space_grows_where_its_largest_settings_look_best() -> None:
    space = candidates(CURRENT, default_space(CURRENT))
    for most, chosen in ((16, {16}), (128, {128}), (4096, {512, 1024})):
        tried = Search(space, LIMITS, always=1, budget_s=1800, bench=Gpu(most), seed=1, larger=lambda _: True)
        assert tried.run().record.settings["parallel"] in chosen
        assert max(int(r.settings["parallel"]) for r in tried.records) <= min(2 * most, 1024)
    tried = Search(space, LIMITS, always=1, budget_s=1800, bench=Gpu(4096), seed=1)
    assert tried.run().record.settings["parallel"] == 16
