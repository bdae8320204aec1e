"""Was the client itself the bottleneck? CPU of its process and lag of its event loop during a run."""

from __future__ import annotations

import time

import gevent
from msgspec import Struct

from llamaherd_loadtest.client import clock
from llamaherd_loadtest.quantiles import quantile

_TICK_S = 0.02
MAX_CPU = 0.85
MAX_LAG_S = 0.05
MIN_CONCURRENCY = 0.9


class Health(Struct, frozen=True, kw_only=True):
    """The client during the measured window. `cpu` is the share of one core; `lag_p95_s` how late timers fired.

    `concurrency` is requests in flight on average, over those asked for (1.0 in an open loop).
    """

    cpu: float
    lag_p95_s: float
    concurrency: float = 1.0

    @property
    def fault(self) -> str:
        """Why the run is invalid; empty where it is valid."""
        if self.cpu > MAX_CPU:
            return f"CPU: the client used {self.cpu:.0%} of its core (limit {MAX_CPU:.0%}): use more load generators"
        if self.lag_p95_s > MAX_LAG_S:
            late, limit = self.lag_p95_s * 1000, MAX_LAG_S * 1000
            return f"event loop: the client's timers were {late:.0f} ms late at p95 (limit {limit:.0f})"
        if self.concurrency < MIN_CONCURRENCY:
            return f"only {self.concurrency:.0%} of the requested concurrency was in flight"
        return ""


class HealthMonitor:
    """Watches this process from `start` to `stop`."""

    def __init__(self) -> None:
        self._lags: list[float] = [0.0]
        self._watcher = gevent.spawn(self._watch)
        self._cpu, self._wall = time.process_time(), clock()

    def stop(self) -> tuple[float, float]:
        """End it: (share of one core used, p95 of the timers' lag in seconds)."""
        self._watcher.kill()
        cpu = (time.process_time() - self._cpu) / max(clock() - self._wall, 1e-9)
        return cpu, quantile(sorted(self._lags), 0.95)

    def _watch(self) -> None:
        while True:
            due = clock() + _TICK_S
            gevent.sleep(_TICK_S)
            self._lags.append(clock() - due)
