"""However slow or busy a host is, a search ends with figures and a choice, or asks for a budget that does."""

from __future__ import annotations

import pytest

from llamaherd_loadtest.tune.decide import Choice
from llamaherd_loadtest.tune.evidence import SLOTS, Load
from llamaherd_loadtest.tune.pace import Calibrated, Pace, Plan, needed_s
from llamaherd_loadtest.tune.search import Search, min_rounds, pair

from .simulated import CURRENT, GRID, BusyServer, search

SEEDS = range(10)
OTHERS = [settings for settings in GRID if settings != CURRENT]


def tuned(server: BusyServer, budget_s: float, seed: int) -> tuple[Search, Choice]:
    """What a job does: calibrate, ask for the budget that is needed, search."""
    found = server.calibrated()
    budget_s = needed_s(found, pair([CURRENT, *OTHERS], SLOTS), budget_s) - found.took_s
    tried = search(server, CURRENT, budget_s=budget_s, seed=seed, calibrated=found)
    return tried, tried.run()


@pytest.mark.parametrize("request_s", [2.0, 20.0, 60.0, 300.0])
@pytest.mark.parametrize("budget_s", [20.0, 150.0, 600.0])
def test_a_slow_host_ends_with_a_confirmed_choice(request_s: float, budget_s: float) -> None:
    confirmed = []
    for seed in SEEDS:
        tried, choice = tuned(BusyServer(seed, request_s=request_s, busy=0.1), budget_s, seed)
        assert choice.measured and tried.records[0].windows
        confirmed.append(sum(record.confirmed for record in tried.records) > 1)
    assert sum(confirmed) >= 0.8 * len(SEEDS)


@pytest.mark.parametrize("busy", [0.3, 0.8])
@pytest.mark.parametrize("spoiled", [0.0, 0.3])
def test_a_busy_host_ends_with_figures_of_several_settings(busy: float, spoiled: float) -> None:
    for seed in SEEDS:
        tried, choice = tuned(BusyServer(seed, request_s=8.0, busy=busy, spoiled=spoiled), 600.0, seed)
        assert choice.measured
        assert sum(record.figures for record in tried.records) > 1


def test_a_budget_that_is_asked_for_is_then_enough() -> None:
    for request_s in (1.0, 8.0, 40.0, 400.0):
        once, slower = (Calibrated(4, factor * request_s, factor * request_s) for factor in (1.0, 1.4))
        needed = needed_s(once, (4, 1), 1.0)
        assert needed_s(slower, (4, 1), needed) == needed


def test_windows_last_as_long_as_requests_do() -> None:
    pace = Pace()
    assert Plan(900.0, pace, (4, 4)).window_s(4) == 18.0
    pace.observe(4, 40.0)
    assert [pace.request_s(load, 1.0) for load in (1, 4, 8)] == [40.0, 40.0, 80.0]
    assert pace.request_s(16, 0.5) == 80.0
    assert Plan(900.0, pace, (4, 4)).window_s(4) == 80.0
    assert Plan(360.0, pace, (4, 4)).window_s(4) == 40.0
    pace.observe(16, 100.0)
    assert [pace.request_s(10, 1.0), pace.request_s(64, 1.0)] == [70.0, pytest.approx(250.0, rel=0.01)]
    assert min_rounds(Load(rate=2.0)) == 2


def test_settings_that_the_budget_cannot_compare_are_not_begun() -> None:
    server = BusyServer(1, request_s=20.0, busy=0.0)
    tried, _ = tuned(server, 400.0, 1)
    assert all(server.request_s(record.settings) < 100.0 for record in tried.records if record.all_windows)
