"""The search: screen many settings, confirm the best against the current ones, choose. It knows no server and no clock.

Time is what measurements say they took, so a replayed journal and a simulated server go the same way as a live run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from llamaherd_loadtest.dice import seeded
from llamaherd_loadtest.limits import Limit
from llamaherd_loadtest.quantiles import Judgement
from llamaherd_loadtest.tune.beliefs import Beliefs, believe
from llamaherd_loadtest.tune.capacity import Capacity, find_capacity, judge, settle
from llamaherd_loadtest.tune.decide import MIN_GAIN, Choice, Contender, choose
from llamaherd_loadtest.tune.evidence import SLOTS, Load, Measurement, Record, limit_noise, score_noise
from llamaherd_loadtest.tune.objective import TOKENS, Objective
from llamaherd_loadtest.tune.pace import Calibrated, Pace, Plan
from llamaherd_loadtest.tune.settings import Settings, label
from llamaherd_loadtest.tune.space import needs_as_much
from llamaherd_loadtest.tune.surrogate import Grid

Phase = Literal["screen", "confirm", "load", "arrivals"]
_CONFIRM_SHARE = 0.3
_MIN_CONFIRM = 4  # windows (A B B A), where the budget leaves time for screening
_CLEAR = 3  # times its margin: a gain that needs no more windows of the current settings
_RANDOM_SHARE = 0.25  # of the screening, before the windows' own evidence leads
_QUIET = 0.03  # the noise of a window's score
_MOST_SLOTS = 1024
_ARRIVALS_SHARE = 0.25  # of the time for the capacity
_ARRIVALS_LOAD = 0.8  # of the capacity: more would only queue


class Bench(Protocol):
    """Measures one window; what goes wrong with settings is part of the measurement, not an exception."""

    def measure(self, settings: Settings, window_s: float, seed: int, load: Load = SLOTS) -> Measurement: ...


class Step(Struct, frozen=True):
    """What was measured, for the progress line and the report. `left_s` is of the time budget."""

    number: int
    phase: Phase
    settings: Settings
    measurement: Measurement
    left_s: float


class Search:
    """One search within a time budget. After `run`, or when it was interrupted, `records` hold what was measured."""

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
        calibrated: Calibrated | None = None,
        larger: Callable[[Settings], bool] = lambda _: False,
        on_step: Callable[[Step], None] = lambda _: None,
    ) -> None:
        """The first of `candidates` are the current settings; the first `always` are never left out.

        All windows but those of `capacity` are under `load`. `calibrated` is what a request took under
        it; without, requests are taken for short until windows show otherwise. `larger` says of settings with more
        slots than all candidates whether they may be added where the most slots look best.
        """
        self.records = [Record(settings) for settings in candidates]
        self.limits, self.objective, self.load = limits, objective, load
        self.spent_s = 0.0
        self.steps = self._valid = 0
        self._grid, self._larger = Grid(candidates), larger
        self._always, self._budget_s, self._bench, self._seed = always, budget_s, bench, seed
        self.on_step = on_step
        self._pace = Pace()
        self._believed: Beliefs | None = None
        if calibrated:
            self._pace.observe(calibrated.concurrency, calibrated.request_s)
        self._plan = Plan(budget_s, self._pace, pair(candidates, load), least_rounds(load))
        self._planned_s = self._took_s = 0.0  # of windows that came to their end

    def run(self) -> Choice:
        """Screen, confirm and choose."""
        if len(self.records) == 1:
            return Choice(record=self.records[0], change=False, reason="there are no other settings to try")
        cost_s = self._cost_s(0)
        confirm_s = max(self._budget_s * _CONFIRM_SHARE, min(_MIN_CONFIRM * cost_s, self._budget_s * 0.6))
        self._screen(self._budget_s - confirm_s)
        self._confirm(finalists=max(1, min(3, int(confirm_s / cost_s) // 4)))
        return self._choose()

    def window_s(self, settings: Settings) -> float:
        """How long a window of these settings is to last under the search's load."""
        return self._plan.window_s(in_flight(settings, self.load))

    def beliefs(self) -> Beliefs:
        """What the windows so far say of all candidates."""
        if self._believed is None:
            self._believed = believe(self._grid, self.records, self.limits)
        return self._believed

    def _screen(self, until_s: float) -> None:
        """The settings that are always in and a random few; then, window by window, what may turn out best."""
        random_until_s = until_s * _RANDOM_SHARE
        first, ahead = [*range(self._always), *self._shuffled_rest()], list[int]()
        while not self._failed() and (rows := self._screenable(until_s)):
            if first and first[0] >= self._always and self.spent_s >= random_until_s:
                first = []
            row = rows[0] if len(rows) == 1 else next((r for r in (*ahead, *first) if r in rows), None)
            if row is None:
                row = self.beliefs().next({*range(len(self.records))} - {*rows}, self._dice())
            first = [r for r in first if r != row]
            self._measure("screen", row)
            ahead = self._grow()
            if not (ahead or first) and self._settled():
                return

    def _screenable(self, until_s: float) -> list[int]:
        """What there is time to measure: the current settings until they were, then what can be confirmed beside them.

        Where the budget is short, the first other setting may take of the time to confirm, or all of it.
        """
        rows = [row for row in range(len(self.records)) if not self._set_aside(row)]
        end_s = {row: self.spent_s + self._cost_s(row) for row in rows if row == 0 or not self._just_failed(row)}
        measured = [row for row, record in enumerate(self.records) if record.figures]
        if 0 not in measured:
            return [0] if end_s[0] <= self._budget_s else []
        round_s = {row: self._round_s([0, row]) for row in end_s}
        if len(measured) > 1:
            return [row for row, end in end_s.items() if end <= until_s and until_s + round_s[row] <= self._budget_s]
        others = sorted((row for row in end_s if row and end_s[row] <= self._budget_s), key=end_s.__getitem__)
        return [row for row in others if end_s[row] + round_s[row] <= self._budget_s] or others[:1]

    def _confirm(self, finalists: int) -> None:
        """Interleave as A B … B A with fresh prompts, so that a drift of the host hits all alike.

        Each round is of the settings that look best by then: one that falls behind leaves its time to the next, and so
        do the current ones once they are clearly beaten. It ends where more windows would not change the choice.
        """
        current, forwards = [0], True
        while not self._failed() and (others := self._finalists(finalists, current)):
            for row in [*current, *others][:: 1 if forwards else -1]:
                self._measure("confirm", row)
            choice = self._choose()
            current = [] if choice.gain > _CLEAR * choice.margin > 0 else [0]
            forwards = not forwards
            if forwards and self._settled(choice):
                return

    def _settled(self, choice: Choice | None = None) -> bool:
        """Whether, on a quiet host, other settings are unlikely to be better, by a gain worth a change, than those
        chosen: the best ones so far, where none are. On a noisy one all time is worth its while."""
        if not self.records[0].figures or score_noise(self.records).sigma > _QUIET:
            return False
        beliefs, aside = self.beliefs(), [*filter(self._set_aside, range(len(self.records)))]
        chosen = beliefs.best(1, aside) if choice is None else [self.records.index(choice.record)]
        return bool(chosen) and beliefs.regret(chosen[0], aside, self._dice()) < MIN_GAIN

    def _grow(self) -> list[int]:
        """Add settings with twice the slots where the most slots did best, as long as they may be launched.

        Returns the row of those that differ from the best in nothing but the slots: they are to be measured next.
        """
        aside = [*filter(self._set_aside, range(len(self.records)))]
        most = max((int(r.settings["parallel"]) for r in self.records), default=0)
        best = self.beliefs().best(1, aside) if self.records[0].figures else []
        if not best or not self.records[best[0]].figures or most >= _MOST_SLOTS:
            return []
        settings = self.records[best[0]].settings
        if int(settings["parallel"]) < most:
            return []
        edge = [{**r.settings, "parallel": 2 * most} for r in self.records if r.settings["parallel"] == most]
        grown = [*filter(self._larger, edge)]
        if grown:
            self.records += map(Record, grown)
            self._grid, self._believed = Grid([r.settings for r in self.records]), None
        return [row for row, r in enumerate(self.records) if r.settings == {**settings, "parallel": 2 * most}]

    def _finalists(self, count: int, current: Sequence[int]) -> list[int]:
        """Up to `count` that look best, as many as one round has time for beside `current`."""
        if not self.records[0].figures:
            return []
        left_s = self._budget_s - self.spent_s
        rows = range(1, len(self.records))
        unfit = [
            r
            for r in rows
            if not self.records[r].figures or self._just_failed(r) or self._round_s([*current, r]) > left_s
        ]
        found = self.beliefs().best(count, {0, *unfit, *filter(self._set_aside, rows)})
        while found and self._round_s([*current, *found]) > left_s:
            found.pop()
        return found

    def _dice(self) -> np.random.Generator:
        return np.random.default_rng([self._seed, self.steps])

    def _choose(self) -> Choice:
        current = self.records[0]
        confirmed = [row for row, r in enumerate(self.records) if r.confirmed and not r.fault]
        if current.fault:
            return Choice(record=current, change=False, reason=current.fault)
        if not current.figures:
            return Choice(record=current, change=False, reason=current.spoiled, measured=False)
        if 0 not in confirmed:
            return Choice(record=current, change=False, reason="there was no time to confirm another")
        beliefs = self.beliefs()
        contenders = [
            Contender(self.records[row], float(beliefs.score.mean[row]), beliefs.judge(row, self.records[row])[0])
            for row in confirmed
        ]
        choice = choose(contenders[0], contenders[1:], score_noise(self.records), self.objective)
        nearest = beliefs.nearest_miss(row for row, r in enumerate(self.records) if r.figures and not r.fault)
        if choice.change or nearest is None:
            return choice
        row, limit, excess = nearest
        reason = f"no settings keep the limits; the nearest, {label(self.records[row].settings)}, misses {limit}"
        return Choice(record=current, change=False, reason=f"{reason} by {excess:.0%}")

    def capacity(self, settings: Settings, budget_s: float) -> Capacity | None:
        """The load that `settings` carry within the limits, by windows that take `budget_s` seconds at most.

        What they carry of requests that wait for each other's answers is then checked with some that do not.
        """
        until_s = self.spent_s + budget_s
        climb_until_s = until_s - _ARRIVALS_SHARE * budget_s
        answered: dict[int, float] = {}

        def decide(windows: list[Measurement]) -> Judgement:
            return judge(windows, self.limits, lambda limit: limit_noise(self.records, limit).sigma)

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
        (record.screening if phase == "screen" else record.confirming).append(measurement)
        self._believed = None
        if measurement.does_not_fit:
            for other in self.records:
                if not other.all_windows and needs_as_much(other.settings, record.settings):
                    other.ruled_out = (
                        f"not launched: needs no less memory than {label(record.settings)}, which does not fit"
                    )

    def _window(self, phase: Phase, settings: Settings, until_s: float, load: Load) -> Measurement:
        self.steps += 1
        concurrency = in_flight(settings, load)
        window_s, planned_s = self._plan.window_s(concurrency), self._plan.cost_s(concurrency)
        measurement = self._bench.measure(settings, window_s, self._seed * 1000 + self.steps, load)
        measurement.valid_before = self._valid
        self._valid += not measurement.fault
        self.spent_s += measurement.took_s
        self._pace.observe(concurrency, measurement.request_s)
        if not measurement.fault:
            self._planned_s, self._took_s = self._planned_s + planned_s, self._took_s + measurement.took_s
        self.on_step(Step(self.steps, phase, settings, measurement, max(0.0, until_s - self.spent_s)))
        return measurement

    def _round_s(self, rows: Sequence[int]) -> float:
        """Seconds that one window of each of `rows` takes."""
        return sum(map(self._cost_s, rows))

    def _cost_s(self, row: int) -> float:
        return self._takes_s(self.records[row].settings, self.load)

    def _takes_s(self, settings: Settings, load: Load) -> float:
        """Seconds that one more window takes: as planned, and as much longer as windows took so far."""
        slower = max(1.0, self._took_s / self._planned_s) if self._planned_s else 1.0
        return slower * self._plan.cost_s(in_flight(settings, load))

    def _over(self, until_s: float, settings: Settings, load: Load) -> bool:
        return self.spent_s + self._takes_s(settings, load) > until_s

    def _shuffled_rest(self) -> list[int]:
        rest = list(range(self._always, len(self.records)))
        seeded(self._seed, "order").shuffle(rest)
        return rest

    def _failed(self) -> bool:
        """Whether the current settings do not work, so that there is nothing to compare others with."""
        return bool(self.records[0].fault)

    def _just_failed(self, row: int) -> bool:
        """Whether no window was valid since it failed: what made it fail may go on."""
        return self.records[row].failed_after == self._valid

    def _set_aside(self, row: int) -> bool:
        """Whether it is not measured any more. The current settings are tried for as long as there is time."""
        record = self.records[row]
        return bool(record.fault) or (row > 0 and record.hopeless)


def in_flight(settings: Settings, load: Load) -> int:
    """The requests that a load keeps in flight with `settings`; of arrivals, at most as many as there are slots."""
    return load.concurrency or int(settings["parallel"])


def pair(candidates: Sequence[Settings], load: Load) -> tuple[int, int]:
    """Requests in flight under the current settings, the first, and under the others that need the fewest."""
    loads = [in_flight(settings, load) for settings in candidates]
    return loads[0], min(loads[1:] or loads)


def least_rounds(load: Load) -> int:
    """Requests that a window lasts at least, one after the other: what arrived last has a window's time to end."""
    return 2 if load.rate else 1
