"""The search: screens many settings, confirms the best against the current ones, chooses. Knows no server or clock.

Time is what measurements report, so that a replayed journal and a simulated server behave like a live run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from llamaherd_loadtest.limits import Limit
from llamaherd_loadtest.quantiles import Judgement
from llamaherd_loadtest.tune.capacity import Capacity, find_capacity, settle
from llamaherd_loadtest.tune.decide import MIN_GAIN, Candidate, Choice, choose
from llamaherd_loadtest.tune.estimates import Estimates
from llamaherd_loadtest.tune.evidence import SLOTS, Drift, Load, Measurement, Noise, Record
from llamaherd_loadtest.tune.judge import judge, judge_alone
from llamaherd_loadtest.tune.model import Model
from llamaherd_loadtest.tune.objective import TOKENS, Objective
from llamaherd_loadtest.tune.pace import Calibrated, Pace, Plan
from llamaherd_loadtest.tune.physics import SHAPE, Shape
from llamaherd_loadtest.tune.posterior import Array
from llamaherd_loadtest.tune.settings import Settings, label
from llamaherd_loadtest.tune.space import needs_as_much

Phase = Literal["screen", "confirm", "load", "arrivals"]
_CONFIRM_SHARE = 0.3
_MIN_CONFIRM = 4  # windows (A B B A), if the budget leaves time for screening
_SCREEN_PART = 0.5  # of a confirming window: many short windows cover a large space better than few long ones
_FITTED_FREEDOM, _MIN_FREEDOM = 8, 6  # degrees of freedom: used up by the estimates; from the prior
_CLEAR_GAIN = 3  # times its margin: such a gain needs no more windows of the current settings
_DOUBTS = (1.7, 1.0, 0.5)  # deviations that finalists keep from a limit: one that surely keeps it, then bolder ones
_MAX_ESTIMATED = 1024  # random rows estimated at a step: with thousands, a step would take seconds
_QUIET = 0.03  # noise of a window's score up to which a host is quiet
_MAX_SLOTS = 1024
_ARRIVALS_SHARE = 0.25  # of the time for the capacity
_ARRIVALS_LOAD = 0.8  # of the capacity: more would only queue


class Bench(Protocol):
    """Measures one window. Faults of the settings are part of the measurement, not exceptions."""

    def measure(self, settings: Settings, window_s: float, seed: int, load: Load = SLOTS) -> Measurement: ...


class Step(Struct, frozen=True):
    """One measured window, for the progress line and the report. `left_s` is the rest of the time budget."""

    number: int
    phase: Phase
    settings: Settings
    measurement: Measurement
    left_s: float


class Search:
    """One search within a time budget. After `run`, even if interrupted, `records` hold what was measured."""

    def __init__(
        self,
        candidates: Sequence[Settings],
        limits: Sequence[Limit],
        *,
        always: int,
        budget_s: float,
        bench: Bench,
        seed: int,
        objective: Objective = TOKENS,
        load: Load = SLOTS,
        shape: Shape = SHAPE,
        calibrated: Calibrated | None = None,
        larger: Callable[[Settings], bool] = lambda _: False,
        on_step: Callable[[Step], None] = lambda _: None,
    ) -> None:
        """The first of `candidates` are the current settings; the first `always` are never left out.

        All windows but those of `capacity` use `load`. `calibrated` is the duration of a request under it; without it,
        requests are assumed short until windows show otherwise. `larger` decides whether settings with more slots than
        all candidates may be added when the highest number of slots looks best.
        """
        self.records = [Record(settings) for settings in candidates]
        self.limits, self.objective, self.load = limits, objective, load
        self.spent_s = 0.0
        self.steps = self._valid = 0
        self._model, self._larger = Model(candidates, limits, objective, shape), larger
        self._always, self._budget_s, self._bench, self._seed = always, budget_s, bench, seed
        self.on_step = on_step
        self._pace = Pace()
        self._estimates: Estimates | None = None
        if calibrated:
            self._pace.observe(calibrated.concurrency, calibrated.request_s)
        self._plan = Plan(budget_s, self._pace, pair(candidates, load), min_rounds(load))
        self._promising: Array = np.arange(0)
        self._tried: dict[int, None] = {}  # in the order of their first windows
        self._max_slots = max(int(s["parallel"]) for s in candidates)
        self._flight = np.array([in_flight(s, load) for s in candidates])
        self._eligible = np.ones(len(candidates), bool)  # rows that may still be measured
        self._planned_s = self._took_s = 0.0  # of valid windows

    def run(self) -> Choice:
        """Screen, confirm and choose."""
        if len(self.records) == 1:
            return Choice(record=self.records[0], change=False, reason="there are no other settings to try")
        cost_s = self._cost_s(0)
        confirm_s = max(self._budget_s * _CONFIRM_SHARE, min(_MIN_CONFIRM * cost_s, self._budget_s * 0.6))
        self._screen(self._budget_s - confirm_s)
        if self._settled(self.records[0]) and self.judge(0)[0] is Judgement.PASSES:
            return Choice(record=self.records[0], change=False, reason="no others are likely to be better by 2%")
        self._confirm(finalists=max(1, min(len(_DOUBTS), int(confirm_s / cost_s) // 2)))
        return self._choose()

    def window_s(self, settings: Settings) -> float:
        """Return how long a window of these settings should last under the search's load."""
        return self._plan.window_s(in_flight(settings, self.load))

    def estimates(self) -> Estimates:
        """Return estimates of the measured settings, of those that looked promising before, and of random others."""
        if self._estimates is None:
            others = self._rng().permutation(len(self.records))[:_MAX_ESTIMATED]
            self._estimates = self._model.estimates(np.unique([0, *self._tried, *self._promising, *others]))
            self._promising = self._estimates.promising()
        return self._estimates

    def judge(self, row: int) -> tuple[Judgement, str]:
        """Return whether a measured setting keeps the limits, and the limit that decides."""
        estimates = self.estimates()
        return judge(self.records[row], estimates.excess(row), Drift(estimates.drift, estimates.middle))

    def _screen(self, until_s: float) -> None:
        """Measure the settings that are always included, then, window by window, what may turn out best."""
        first, ahead = [*range(self._always)], list[int]()
        while not self._failed() and (may := self._screenable(until_s)).any():
            cheapest = int(np.argmin(np.where(may, self._costs_s(_SCREEN_PART), np.inf)))
            row = cheapest if may.sum() == 1 else next((r for r in (*ahead, *first) if may[r]), None)
            if row is None:
                row = self.estimates().next(may, self._rng())
            row = cheapest if row is None else row
            first = [r for r in first if r != row]
            self._measure("screen", row)
            ahead = self._grow()
            if not (ahead or first) and self._settled():
                return

    def _screenable(self, until_s: float) -> Array:
        """Return the rows there is time for: the current settings until measured, then rows that can be confirmed too.

        If the budget is short, the first other setting may use part of the time for confirming, or all of it.
        """
        screened_s, whole_s = self._costs_s(_SCREEN_PART), self._costs_s()
        current = np.arange(len(self.records)) == 0
        may = self._eligible & ~self._failing() | current
        measured = [row for row in self._tried if self.records[row].figures]
        left_s = self._budget_s - self.spent_s
        found: Array
        if 0 not in measured:
            found = current & (screened_s <= left_s)
        elif len(measured) > 1:
            to_confirm_s = self._budget_s - until_s - whole_s[0]
            found = may & (self.spent_s + screened_s <= until_s) & (whole_s <= to_confirm_s)
        else:
            found = may & ~current & (screened_s <= left_s)
            beside: Array = found & (whole_s[0] + 2 * screened_s <= left_s)
            if beside.any():
                return beside
            if found.any():
                found = np.arange(len(found)) == int(np.argmin(np.where(found, screened_s, np.inf)))
        return found

    def _confirm(self, finalists: int) -> None:
        """Interleave as A B … B A with fresh prompts, so that a drift of the host affects all alike.

        Each round measures the settings that look best by then: one that falls behind yields its time to the next, and
        so do the current ones once they are clearly beaten. It ends when more windows would not change the choice.
        """
        current, forwards = [0], True
        while not self._failed() and (others := self._finalists(finalists, current)):
            for row in [*current, *others][:: 1 if forwards else -1]:
                self._measure("confirm", row)
            choice = self._choose()
            current = [] if choice.gain > _CLEAR_GAIN * choice.margin > 0 else [0]
            forwards = not forwards
            if forwards and self._settled(choice.record):
                return

    def _settled(self, chosen: Record | None = None) -> bool:
        """Return whether, on a quiet host, no other settings are expected to gain enough over the chosen (by default,
        the best so far) to be worth a change. A noisy host uses its whole budget."""
        if self._failed() or not self.records[0].figures or (estimates := self.estimates()).noise > _QUIET:
            return False
        rows = estimates.best(1, self._eligible) if chosen is None else [self.records.index(chosen)]
        return (
            bool(rows)
            and self.records[rows[0]].figures
            and estimates.regret(rows[0], self._eligible, self._rng()) < MIN_GAIN
        )

    def _grow(self) -> list[int]:
        """Add settings with twice the slots if the highest number did best, as long as they may be launched.

        Returns the row that differs from the best only in its slots, to be measured next.
        """
        best = self.estimates().best(1, self._eligible) if self.records[0].figures else []
        if not best or not self.records[best[0]].figures or self._max_slots >= _MAX_SLOTS:
            return []
        settings, most = self.records[best[0]].settings, self._max_slots
        if int(settings["parallel"]) < most:
            return []
        edge = [{**r.settings, "parallel": 2 * most} for r in self.records if r.settings["parallel"] == most]
        if grown := [*filter(self._larger, edge)]:
            self.records += map(Record, grown)
            self._flight = np.append(self._flight, [in_flight(s, self.load) for s in grown])
            self._eligible = np.append(self._eligible, np.ones(len(grown), bool))
            self._max_slots, self._estimates = 2 * most, None
            self._model.space([r.settings for r in self.records])
        return [row for row, r in enumerate(self.records) if r.settings == {**settings, "parallel": 2 * most}]

    def _finalists(self, count: int, current: Sequence[int]) -> list[int]:
        """Return up to `count` rows that look best, as many as one round beside `current` has time for."""
        if not self.records[0].figures:
            return []
        left_s = self._budget_s - self.spent_s
        may = self._eligible & ~self._failing() & (self._round_s(current) + self._costs_s() <= left_s)
        may[0] = False
        found = list[int]()
        for doubt in _DOUBTS[:count]:
            found += self.estimates().best(1, may, doubt)
            may[found] = False
        while found and self._round_s([*current, *found]) > left_s:
            found.pop()
        return found

    def _rng(self) -> np.random.Generator:
        return np.random.default_rng([self._seed, self.steps])

    def _choose(self) -> Choice:
        current = self.records[0]
        confirmed = [row for row in self._tried if self.records[row].confirmed and not self.records[row].fault]
        if current.fault:
            return Choice(record=current, change=False, reason=current.fault)
        if not current.figures:
            return Choice(record=current, change=False, reason=current.last_fault, measured=False)
        if 0 not in confirmed:
            return Choice(record=current, change=False, reason="there was no time to confirm other settings")
        estimates = self.estimates()
        candidates = []
        for row in confirmed:
            judgement, limit = self.judge(row)
            risk = 1.0 if judgement is Judgement.MISSES and limit == "error_rate" else estimates.risk(row)
            candidates.append(Candidate(self.records[row], judgement, *estimates.gain(row), risk))
        own = next(c for c in candidates if c.record is current)
        windows = sum(len(self.records[row].all_windows) for row in self._tried)
        noise = Noise(estimates.noise, max(_MIN_FREEDOM, windows - _FITTED_FREEDOM))
        others = [c for c in candidates if c is not own]
        choice = choose(own, others, noise, self.objective, estimates.drift)
        misses = [
            max((mean, limit.name, row) for limit, mean, _ in estimates.excess(row))
            for row in self._tried
            if self.limits and self.records[row].figures and not self.records[row].fault
        ]
        excess, limit, row = min(misses, default=(0.0, "", 0))
        if choice.change or excess <= 0:
            return choice
        reason = f"no settings keep the limits; the nearest, {label(self.records[row].settings)}, misses {limit}"
        return Choice(record=current, change=False, reason=f"{reason} by {math.expm1(excess):.0%}")

    def capacity(self, settings: Settings, budget_s: float) -> Capacity | None:
        """Return the load that `settings` carry within the limits, measured in at most `budget_s` seconds.

        The capacity is found in a closed loop, and then checked in an open loop of most of its rate.
        """
        until_s = self.spent_s + budget_s
        climb_until_s = until_s - _ARRIVALS_SHARE * budget_s
        answered: dict[int, float] = {}

        def decide(windows: list[Measurement]) -> Judgement:
            tried = [self.records[row] for row in self._tried]
            return judge_alone(Record(settings, screening=windows), self.limits, tried)

        def climb(concurrency: int) -> Measurement | None:
            load = Load(concurrency)
            if self._over(climb_until_s, settings, load):
                return None
            window = self._window("load", settings, until_s, load)
            answered[concurrency] = window.requests_per_s
            return window

        def arrive() -> Measurement | None:
            load = Load(rate=rate)
            return None if self._over(until_s, settings, load) else self._window("arrivals", settings, until_s, load)

        found = find_capacity(lambda load: settle(lambda: climb(load), decide), int(settings["parallel"]))
        if found is None or not found.keeps:
            return found
        rate = _ARRIVALS_LOAD * answered[found.keeps]
        return replace(found, rate=rate, arrivals=settle(arrive, decide))

    def _measure(self, phase: Phase, row: int) -> None:
        record = self.records[row]
        measurement = self._window(phase, record.settings, self._budget_s, self.load)
        if self._estimates and not record.all_windows:
            record.predicted = self._estimates.score(row)
        (record.screening if phase == "screen" else record.confirming).append(measurement)
        self._tried[row] = None
        self._estimates = None
        if not measurement.fault:
            self._model.add(row, measurement, measurement.at)
        if record.fault or (row and record.unmeasurable):  # the current settings are tried until the time is up
            self._eligible[row] = False
        if measurement.does_not_fit:
            for place, other in enumerate(self.records):
                if not other.all_windows and needs_as_much(other.settings, record.settings):
                    self._eligible[place] = False
                    other.ruled_out = (
                        f"not launched: needs no less memory than {label(record.settings)}, which does not fit"
                    )

    def _window(self, phase: Phase, settings: Settings, until_s: float, load: Load) -> Measurement:
        self.steps += 1
        concurrency, part = in_flight(settings, load), _SCREEN_PART if phase == "screen" else 1.0
        window_s, planned_s = self._plan.window_s(concurrency, part), self._plan.cost_s(concurrency, part)
        measurement = self._bench.measure(settings, window_s, self._seed * 1000 + self.steps, load)
        measurement.valid_before, measurement.at = self._valid, self.spent_s / self._budget_s
        self._valid += not measurement.fault
        self.spent_s += measurement.took_s
        self._pace.observe(concurrency, measurement.request_s)
        if not measurement.fault:
            self._planned_s, self._took_s = self._planned_s + planned_s, self._took_s + measurement.took_s
        self.on_step(Step(self.steps, phase, settings, measurement, max(0.0, until_s - self.spent_s)))
        return measurement

    def _round_s(self, rows: Sequence[int]) -> float:
        """Seconds for one window of each of `rows`."""
        return sum(map(self._cost_s, rows))

    def _costs_s(self, part: float = 1.0) -> Array:
        """Seconds for one more window of each row."""
        loads, of = np.unique(self._flight, return_inverse=True)
        costs: Array = self._slower() * np.array([self._plan.cost_s(int(n), part) for n in loads])[of]
        return costs

    def _cost_s(self, row: int, part: float = 1.0) -> float:
        return self._takes_s(self.records[row].settings, self.load, part)

    def _takes_s(self, settings: Settings, load: Load, part: float = 1.0) -> float:
        """Seconds for one more window: the plan, scaled up by the overrun of earlier windows."""
        return self._slower() * self._plan.cost_s(in_flight(settings, load), part)

    def _slower(self) -> float:
        """By which factor valid windows took longer than planned; at least 1."""
        return max(1.0, self._took_s / self._planned_s) if self._planned_s else 1.0

    def _over(self, until_s: float, settings: Settings, load: Load) -> bool:
        return self.spent_s + self._takes_s(settings, load) > until_s

    def _failed(self) -> bool:
        """Whether the current settings do not work, so that others cannot be compared with them."""
        return bool(self.records[0].fault)

    def _failing(self) -> Array:
        """Rows since whose last failure no window of any settings was valid: the cause may persist."""
        failing = np.zeros(len(self.records), bool)
        failing[[row for row in self._tried if self.records[row].failed_after == self._valid]] = True
        return failing


def in_flight(settings: Settings, load: Load) -> int:
    """Return the requests that `load` keeps in flight with `settings`; for arrivals, at most one per slot."""
    return load.concurrency or int(settings["parallel"])


def pair(candidates: Sequence[Settings], load: Load) -> tuple[int, int]:
    """Return the requests in flight under the current settings, the first, and under the cheapest others."""
    loads = [in_flight(settings, load) for settings in candidates]
    return loads[0], min(loads[1:] or loads)


def min_rounds(load: Load) -> int:
    """Return the minimum window length in consecutive requests; late arrivals have one window's time to end."""
    return 2 if load.rate else 1
