"""The search: screen many settings, confirm the best against the current ones, choose. It knows no server and no clock.

Time is what measurements say they took, so a replayed journal and a simulated server go the same way as a live run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from llamaherd_loadtest.dice import seeded
from llamaherd_loadtest.limits import Limit
from llamaherd_loadtest.tune.beliefs import Beliefs, Judgement, believe
from llamaherd_loadtest.tune.capacity import Capacity, find_capacity, judge, settle
from llamaherd_loadtest.tune.decide import Choice, Contender, choose
from llamaherd_loadtest.tune.evidence import SLOTS, Load, Measurement, Record, limit_noise, score_noise
from llamaherd_loadtest.tune.objective import TOKENS, Objective
from llamaherd_loadtest.tune.settings import Settings, label
from llamaherd_loadtest.tune.space import needs_as_much
from llamaherd_loadtest.tune.surrogate import Grid

Phase = Literal["screen", "confirm", "load", "arrivals"]
_CONFIRM_SHARE = 0.3
_MIN_CONFIRM = 4  # windows (A B B A), where the budget leaves time for screening
_CLEAR = 3  # times its margin: a gain that needs no more windows of the current settings
_RANDOM_SHARE = 0.25  # of the screening, before the windows' own evidence leads
_ARRIVALS_SHARE = 0.25  # of the time for the capacity
_ARRIVALS_LOAD = 0.8  # of the capacity: more would only queue
_OVERHEAD = 0.4  # of a window, for changing settings and warming up; corrected by what measurements take
_MAX_WINDOW_S = 30.0


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
        on_step: Callable[[Step], None] = lambda _: None,
    ) -> None:
        """The first of `candidates` are the current settings; the first `always` are never left out.

        All windows but those of `capacity` are under `load`.
        """
        self.records = [Record(settings) for settings in candidates]
        self.limits, self.objective, self.load = limits, objective, load
        self.spent_s = 0.0
        self.steps = 0
        self._grid = Grid(candidates)
        self._always, self._budget_s, self._bench, self._seed = always, budget_s, bench, seed
        self.on_step = on_step
        # A larger budget buys both more windows and longer ones: 150 s make 14 of 7 s, 15 minutes 36 of 18 s.
        self.window_s = min(0.6 * math.sqrt(budget_s), _MAX_WINDOW_S)

    def run(self) -> Choice:
        """Screen, confirm and choose."""
        confirm_s = max(self._budget_s * _CONFIRM_SHARE, min(_MIN_CONFIRM * self._cost_s, self._budget_s * 0.6))
        if len(self.records) == 1:
            return Choice(record=self.records[0], change=False, reason="there are no other settings to try")
        self._screen(self._budget_s - confirm_s)
        self._confirm(finalists=max(1, min(3, int(confirm_s / self._cost_s) // 4)))
        return self._choose()

    def beliefs(self) -> Beliefs:
        """What the windows so far say of all candidates."""
        return believe(self._grid, self.records, self.limits)

    def _screen(self, until_s: float) -> None:
        """The settings that are always in and a random few; then, window by window, what may turn out best."""
        first = [*range(self._always), *self._shuffled_rest()]
        random_until_s = until_s * _RANDOM_SHARE
        for row in first:
            if row >= self._always and (self.spent_s >= random_until_s or self._over(until_s)):
                break
            self._measure("screen", row)
            if self.records[0].fault:
                return
        while not self._over(until_s) and not self.records[0].fault:
            self._measure("screen", self.beliefs().next(self._faulted(), self._dice()))

    def _confirm(self, finalists: int) -> None:
        """Interleave as A B … B A with fresh prompts, so that a drift of the host hits all alike.

        Each round is of the settings that look best by then: one that falls behind leaves its time to the next, and so
        do the current ones once they are clearly beaten.
        """
        if self.records[0].fault:
            return
        order, forwards = [0, *self._finalists(finalists)], True
        while order != [0] and not self._over(self._budget_s, windows=len(order)):
            for row in order:
                self._measure("confirm", row)
            choice = self._choose()
            current = [] if choice.gain > _CLEAR * choice.margin > 0 else [0]
            forwards = not forwards
            order = [*current, *self._finalists(finalists)][:: 1 if forwards else -1]

    def _finalists(self, count: int) -> list[int]:
        return self.beliefs().best(count, {0, *self._faulted(), *self._unmeasured()})

    def _dice(self) -> np.random.Generator:
        return np.random.default_rng([self._seed, self.steps])

    def _choose(self) -> Choice:
        current = self.records[0]
        confirmed = [row for row, r in enumerate(self.records) if r.confirming and not r.fault]
        if current.fault or 0 not in confirmed:
            return Choice(record=current, change=False, reason=current.fault or "there was no time to confirm another")
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
            if self._over(climb_until_s):
                return None
            window = self._window("load", settings, until_s, Load(concurrency))
            answered[concurrency] = window.requests_per_s
            return window

        def arrive() -> Measurement | None:
            return None if self._over(until_s) else self._window("arrivals", settings, until_s, Load(rate=rate))

        found = find_capacity(lambda load: settle(lambda: climb(load), decide), int(settings["parallel"]))
        if found is None or not found.keeps:
            return found
        rate = _ARRIVALS_LOAD * answered[found.keeps]
        return replace(found, rate=rate, arrivals=settle(arrive, decide))

    def _measure(self, phase: Phase, row: int) -> None:
        record = self.records[row]
        measurement = self._window(phase, record.settings, self._budget_s, self.load)
        (record.screening if phase == "screen" else record.confirming).append(measurement)
        if measurement.does_not_fit:
            for other in self.records:
                if not other.all_windows and needs_as_much(other.settings, record.settings):
                    other.ruled_out = (
                        f"not launched: needs no less memory than {label(record.settings)}, which does not fit"
                    )

    def _window(self, phase: Phase, settings: Settings, until_s: float, load: Load) -> Measurement:
        self.steps += 1
        measurement = self._bench.measure(settings, self.window_s, self._seed * 1000 + self.steps, load)
        self.spent_s += measurement.took_s
        self.on_step(Step(self.steps, phase, settings, measurement, max(0.0, until_s - self.spent_s)))
        return measurement

    @property
    def _cost_s(self) -> float:
        """Seconds that one more window takes."""
        expected = self.window_s * (1 + _OVERHEAD)
        return max(expected, self.spent_s / self.steps) if self.steps else expected

    def _over(self, until_s: float, windows: int = 1) -> bool:
        return self.spent_s + windows * self._cost_s > until_s

    def _shuffled_rest(self) -> list[int]:
        rest = list(range(self._always, len(self.records)))
        seeded(self._seed, "order").shuffle(rest)
        return rest

    def _faulted(self) -> set[int]:
        return {row for row, record in enumerate(self.records) if record.fault}

    def _unmeasured(self) -> set[int]:
        return {row for row, record in enumerate(self.records) if not record.figures}
