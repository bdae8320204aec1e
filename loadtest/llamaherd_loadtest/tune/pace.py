"""How long windows last on this host, and how many of them the time budget allows. All pure."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from itertools import count
from statistics import fmean

import numpy as np
from msgspec import Struct

_MEASUREMENTS_PER_LOAD = 3  # measurements per load: the load of a busy host changes
_MAX_WINDOW_S = 30.0  # if requests are short
_OVERHEAD = 0.4  # of such a window, for changing settings and warming up; corrected by the time measurements take
_MIN_WINDOWS = 4  # for a choice: the current settings and another, each screened and confirmed once
_GOOD_WINDOWS = 6  # confirmed as A B B A
_OVERRUN = 1.2  # factor by which windows may overrun before a budget is too small
_SUGGESTED_OVERRUN = 1.8  # the same factor for a suggested budget: the host may be busier next time
_STEP_S = 10.0
_GROWTH = 0.5


class Calibrated(Struct, tag="calibrated", frozen=True):
    """The calibration under the search's load: `request_s` is a request's duration, `took_s` its own."""

    concurrency: int
    request_s: float
    took_s: float


class Pace:
    """Seconds from a request's send to its end, by the number of requests in flight."""

    def __init__(self) -> None:
        self._seen: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_MEASUREMENTS_PER_LOAD))

    def observe(self, concurrency: int, request_s: float) -> None:
        """Record the duration of requests; 0 if none completed."""
        if request_s > 0:
            self._seen[concurrency].append(request_s)

    def request_s(self, concurrency: int, growth: float) -> float:
        """Return the duration of a request; 0 if nothing is known.

        Above the highest measured load it extrapolates the growth between the last two loads, at most in proportion to
        the load, as on a saturated host. If only one load was measured, it grows with the load to the power `growth`.
        Below the lowest it stays constant.
        """
        if not self._seen:
            return 0.0
        loads = sorted(self._seen)
        times = [fmean(self._seen[load]) for load in loads]
        if concurrency <= loads[-1]:
            return float(np.interp(concurrency, loads, times))
        if len(loads) > 1:
            growth = math.log(times[-1] / times[-2]) / math.log(loads[-1] / loads[-2])
        return times[-1] * math.pow(concurrency / loads[-1], min(max(growth, 0.0), 1.0))


class Plan:
    """The windows that `budget_s` allows.

    If requests are short, a larger budget buys both more and longer windows: 14 of 7 s in 150 s, 36 of 18 s in 15
    minutes. If they are long, a window lasts two requests, or `min_rounds` if the budget is short. `pair` holds the
    requests in flight under the current settings and under the cheapest others.
    """

    def __init__(self, budget_s: float, pace: Pace, pair: tuple[int, int], min_rounds: int = 1) -> None:
        self.pace = pace
        self.short_s = min(0.6 * math.sqrt(budget_s), _MAX_WINDOW_S, budget_s / _GOOD_WINDOWS / (1 + _OVERHEAD))
        self._pair, self._rounds, self._growth = pair, 2, _GROWTH
        if self.min_s(_GOOD_WINDOWS) > budget_s:
            self._rounds, self._growth = min_rounds, 1.0  # an overrunning window would leave no time for another

    def window_s(self, concurrency: int, part: float = 1.0) -> float:
        """Seconds that a window with `concurrency` requests should last; `part` of that if requests are short."""
        return max(part * self.short_s, self._rounds * self.pace.request_s(concurrency, self._growth))

    def cost_s(self, concurrency: int, part: float = 1.0) -> float:
        """Seconds that such a window takes, including the change of settings and the warm-up."""
        return self.window_s(concurrency, part) + max(
            _OVERHEAD * part * self.short_s, self.pace.request_s(concurrency, self._growth)
        )

    def min_s(self, windows: int = _MIN_WINDOWS) -> float:
        """Seconds that `windows` take, half of them under each load of the pair."""
        return windows / 2 * sum(map(self.cost_s, self._pair))


def needed_s(calibrated: Calibrated, pair: tuple[int, int], budget_s: float, min_rounds: int = 1) -> float:
    """Return a budget for a choice: `budget_s` if it is enough, otherwise one with a margin, in steps of 10 s."""

    def enough(budget: float, margin: float) -> bool:
        pace, left = Pace(), budget - calibrated.took_s
        pace.observe(calibrated.concurrency, calibrated.request_s)
        return left > 0 and margin * Plan(left, pace, pair, min_rounds).min_s() <= left

    if enough(budget_s, _OVERRUN):
        return budget_s
    steps = (step * _STEP_S for step in count(math.ceil(budget_s / _STEP_S)))
    return next(step for step in steps if enough(step, _SUGGESTED_OVERRUN))
