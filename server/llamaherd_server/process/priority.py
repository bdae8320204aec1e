"""Less of the CPU for a process that takes much of it, so that those who compute tokens have it."""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress

SLOW_S, SLOW_NICE, START_NICE = 0.05, 10, 5


def lower() -> None:
    """Lower the calling thread's priority, and no other's: what it forks later from another thread has the old one."""
    if sys.platform == "linux":  # elsewhere threads have none of their own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + START_NICE)


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

    @property
    def used_s(self) -> float:
        """Of this piece of work."""
        return self._clock() - self._began

    def look(self) -> None:
        if self.lost or self.used_s < SLOW_S:
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
