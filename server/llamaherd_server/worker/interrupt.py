"""Stopping a step half way, from another thread than the one that computes it."""

from __future__ import annotations

import ctypes
import time
from typing import Any

from llamaherd_server.worker.lib import Log

# How long those who arrive together may take to do so: less than a step, and than what a ubatch computed is worth.
GATHER_S = 0.05


class Interrupt:
    """llama.cpp asks after each node of its graph whether to stop, on the CPU and on Metal; elsewhere a step runs on.

    What it calls for that is libc's strlen, on a flag of no or one character: a Python function would have its threads
    wait for the interpreter's lock a thousand times a step.
    """

    def __init__(self, lib: Any, log: Log) -> None:
        self.mostly_for: int | None = None  # the request that has most of the batch being computed
        self.preemptible = False  # whether most of it is prompts of preemptible requests
        self._began: float | None = None
        self._log = log
        self._flag = ctypes.create_string_buffer(2)
        self._ask = lib.ggml_abort_callback(ctypes.cast(ctypes.CDLL(None).strlen, ctypes.c_void_p).value)
        self._lib = lib

    def watch(self, context: Any) -> None:
        """Have llama.cpp ask while it computes in `context`."""
        self._lib.llama_set_abort_callback(context, self._ask, ctypes.cast(self._flag, ctypes.c_void_p))

    def set(self) -> None:
        """Stop what is being computed, or is begun before `clear`. llama.cpp reports that as an error: not logged."""
        self._log.muted = True
        self._flag[0] = b"\1"

    def clear(self) -> None:
        self._flag[0] = b"\0"
        self._log.muted = False

    def gather(self, beginning: bool) -> None:
        """The next step is the first of those that begin together, or one of theirs, or not `beginning` at all."""
        self._began = (self._began or time.monotonic()) if beginning else None

    def joins(self) -> bool:
        """Whether a request that arrives now should begin with those whose first step is being computed."""
        return self._began is not None and time.monotonic() - self._began < GATHER_S
