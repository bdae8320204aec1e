"""Less of the CPU for a process that takes much of it, so that those who compute tokens have it."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress

SLOW_S, SLOW_NICE = 0.1, 5


class Patience:
    """Watches a child at one piece of work: beyond SLOW_S of CPU time (on macOS: of time) its priority is lowered."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._began = 0.0
        self.again()
        self.lost = False  # whether the priority was lowered, from which there is no way back

    def again(self) -> None:
        """Another piece of work begins."""
        self._began = self._clock()

    def look(self) -> None:
        if self.lost or self._clock() - self._began < SLOW_S:
            return
        self.lost = True
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self._pid, os.getpriority(os.PRIO_PROCESS, 0) + SLOW_NICE)

    def _clock(self) -> float:
        if sys.platform != "linux":
            return time.monotonic()
        try:
            return time.clock_gettime(~self._pid << 3 | 2)  # clock_getcpuclockid(3), which Python has for threads only
        except OSError:  # it has ended
            return self._began
