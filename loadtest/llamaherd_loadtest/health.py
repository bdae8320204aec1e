"""Detects a client that was the bottleneck, from its process's CPU use and the lag of its event loop."""

from __future__ import annotations

import math
import time

import gevent
from msgspec import Struct

from llamaherd_loadtest.client import clock
from llamaherd_loadtest.quantiles import quantile

_TICK_S = 0.02
MAX_CPU = 0.85
_LAG_S = 0.025  # a client on a shared machine may be this late
_LAG_SHARE = 0.1  # of the median TTFT: on a slow host lateness matters less
MIN_CONCURRENCY = 0.9


def max_lag_s(ttft_s: float, itl_s: float = math.inf) -> float:
    """Return how late a client may be: a share of the median TTFT, up to the median gap; at least _LAG_S."""
    return max(_LAG_S, min(_LAG_SHARE * ttft_s, itl_s))


class Health(Struct, frozen=True, kw_only=True):
    """The client during the measured window. `cpu` is the share of one core, `lag_p95_s` how late timers fired.

    `concurrency` is the mean number of requests in flight over the requested one (1.0 in an open loop).
    """

    cpu: float
    lag_p95_s: float
    concurrency: float = 1.0

    def fault(self, ttft_s: float = 0.0, itl_s: float = math.inf) -> str:
        """Return why a run with this median TTFT and median gap is invalid; empty if it is valid."""
        if self.cpu > MAX_CPU:
            return f"CPU: the client used {self.cpu:.0%} of its core (limit {MAX_CPU:.0%}): use more load generators"
        limit_s = max_lag_s(ttft_s, itl_s or math.inf)
        if self.lag_p95_s > limit_s:
            late = self.lag_p95_s * 1000
            return f"event loop: the client's timers were {late:.0f} ms late at p95 (limit {limit_s * 1000:.0f})"
        if self.concurrency < MIN_CONCURRENCY:
            return f"only {self.concurrency:.0%} of the requested concurrency was in flight"
        return ""


class HealthMonitor:
    """Watches this process until `stop`."""

    def __init__(self) -> None:
        self._ticks = [(clock(), time.process_time(), 0.0)]  # time, CPU seconds so far, lag
        self._watcher = gevent.spawn(self._watch)

    def stop(self, start: float = 0.0, end: float = math.inf) -> tuple[float, float]:
        """Stop; return the share of one core used and the p95 of timer lag (s) between `start` and `end`."""
        self._watcher.kill()
        self._ticks.append((clock(), time.process_time(), 0.0))
        inside = [tick for tick in self._ticks if start <= tick[0] <= end] or self._ticks[-1:]
        (first, cpu_before, _), (last, cpu_after, _) = inside[0], inside[-1]
        cpu = (cpu_after - cpu_before) / max(last - first, 1e-9)
        return cpu, quantile(sorted(lag for _, _, lag in inside), 0.95)

    def _watch(self) -> None:
        while True:
            due = clock() + _TICK_S
            gevent.sleep(_TICK_S)
            now = clock()
            self._ticks.append((now, time.process_time(), now - due))
