"""How long windows are on this host, and how many its time budget pays for. All pure."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from itertools import count
from statistics import fmean

import numpy as np
from msgspec import Struct

_KEPT = 3  # measurements of one load: a busy host changes
_MAX_WINDOW_S = 30.0  # where requests are short
_OVERHEAD = 0.4  # of such a window, for changing settings and warming up; corrected by what measurements take
_LEAST_WINDOWS = 4  # for a choice: the current settings and another, screened and confirmed once each
_GOOD_WINDOWS = 6  # confirmed as A B B A
_RESERVE = 1.2  # by which windows may take longer than planned before a budget is too small
_MARGIN = 1.8  # and for a budget that is asked for: the host may be busier next time
_STEP_S = 10.0
_GROWTH = 0.5


class Calibrated(Struct, tag="calibrated", frozen=True):
    """What requests under the search's load took before it began: `request_s` each, `took_s` in all."""

    concurrency: int
    request_s: float
    took_s: float


class Pace:
    """Seconds from a request's send to its end, by the requests in flight."""

    def __init__(self) -> None:
        self._seen: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_KEPT))

    def observe(self, concurrency: int, request_s: float) -> None:
        """Note what requests took; 0 where none was seen to its end."""
        if request_s > 0:
            self._seen[concurrency].append(request_s)

    def request_s(self, concurrency: int, growth: float) -> float:
        """What a request takes; 0 where nothing is known.

        Beyond the most requests in flight that were measured it grows as it did before, at most in proportion to them,
        as on a host that is full; where it was measured at one load only, with the power `growth` of the load. Below
        the fewest it stays.
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
    """The windows that `budget_s` pays for.

    Where requests are short, a larger budget buys both more windows and longer ones: 150 s make 14 of 7 s, 15 minutes
    36 of 18 s. Where they are long, a window lasts two requests, or `least_rounds` where the budget is short. `pair`:
    the requests in flight under the current settings and under the cheapest others.
    """

    def __init__(self, budget_s: float, pace: Pace, pair: tuple[int, int], least_rounds: int = 1) -> None:
        self.pace = pace
        self.short_s = min(0.6 * math.sqrt(budget_s), _MAX_WINDOW_S, budget_s / _GOOD_WINDOWS / (1 + _OVERHEAD))
        self._pair, self._rounds, self._growth = pair, 2, _GROWTH
        if self.least_s(_GOOD_WINDOWS) > budget_s:
            self._rounds, self._growth = least_rounds, 1.0  # a window that takes longer than planned would be the last

    def window_s(self, concurrency: int, part: float = 1.0) -> float:
        """How long a window with so many requests in flight is to last; where requests are short, that `part` of it."""
        return max(part * self.short_s, self._rounds * self.pace.request_s(concurrency, self._growth))

    def cost_s(self, concurrency: int, part: float = 1.0) -> float:
        """What such a window takes, the change of settings and the warm-up included."""
        return self.window_s(concurrency, part) + max(
            _OVERHEAD * part * self.short_s, self.pace.request_s(concurrency, self._growth)
        )

    def least_s(self, windows: int = _LEAST_WINDOWS) -> float:
        """What `windows` take, half of them of each of the pair."""
        return windows / 2 * sum(map(self.cost_s, self._pair))


def needed_s(calibrated: Calibrated, pair: tuple[int, int], budget_s: float, least_rounds: int = 1) -> float:
    """The budget that makes a choice: `budget_s` where that does, otherwise one with a margin, in steps of 10 s."""

    def enough(budget: float, margin: float) -> bool:
        pace, left = Pace(), budget - calibrated.took_s
        pace.observe(calibrated.concurrency, calibrated.request_s)
        return left > 0 and margin * Plan(left, pace, pair, least_rounds).least_s() <= left

    if enough(budget_s, _RESERVE):
        return budget_s
    steps = (step * _STEP_S for step in count(math.ceil(budget_s / _STEP_S)))
    return next(step for step in steps if enough(step, _MARGIN))
