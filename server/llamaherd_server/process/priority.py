"""Lowers the CPU priority of expensive helper threads and processes, so that inference gets the CPU first."""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress

SLOW_S, SLOW_NICE, START_NICE = 0.05, 10, 5


def lower() -> None:
    """Lower the calling thread's priority; other threads, and processes forked from them, keep theirs."""
    if sys.platform == "linux":  # elsewhere threads have no priority of their own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + START_NICE)


class Patience:
    """Lowers a child's priority once a task has taken SLOW_S of its CPU time (on macOS: of wall time)."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._began = 0.0
        self.again()
        self.lowered = False  # whether the priority was lowered, which cannot be undone

    def again(self) -> None:
        """Start the clock for a new task."""
        self._began = self._clock()

    @property
    def used_s(self) -> float:
        """CPU time of the current task in seconds (on macOS: wall time)."""
        return self._clock() - self._began

    def look(self) -> None:
        if self.lowered or self.used_s < SLOW_S:
            return
        self.lowered = True
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self._pid, os.getpriority(os.PRIO_PROCESS, 0) + SLOW_NICE)

    def _clock(self) -> float:
        if sys.platform != "linux":
            return time.monotonic()
        try:
            return time.clock_gettime(~self._pid << 3 | 2)  # clock_getcpuclockid(3); Python only has it for threads
        except OSError:  # the child has ended
            return self._began
