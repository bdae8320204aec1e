"""Interrupts a step in the middle, from another thread than the one that computes it."""

from __future__ import annotations

import ctypes
import time
from typing import Any

from llamaherd_server.worker.lib import Log

# Batch window: shorter than a step, and than computing the ubatch that an interruption may discard.
BATCH_WINDOW_S = 0.05


class Interrupt:
    """llama.cpp calls back after each node of its graph, on the CPU and on Metal; other backends finish the step.

    The callback is libc's strlen on a flag of zero or one characters, because a Python function would make its threads
    wait for the GIL a thousand times per step.
    """

    def __init__(self, lib: Any, log: Log) -> None:
        self.mostly_for: int | None = None  # the request with most of the tokens in the current batch
        self.preemptible = False  # whether most of them are prompts of preemptible requests
        self._window_start: float | None = None
        self._log = log
        self._flag = ctypes.create_string_buffer(2)
        self._callback = lib.ggml_abort_callback(ctypes.cast(ctypes.CDLL(None).strlen, ctypes.c_void_p).value)
        self._lib = lib

    def watch(self, context: Any) -> None:
        """Make computation in `context` interruptible."""
        self._lib.llama_set_abort_callback(context, self._callback, ctypes.cast(self._flag, ctypes.c_void_p))

    def set(self) -> None:
        """Interrupt all computation until `clear`. llama.cpp logs that as an error, so its log is muted."""
        self._log.muted = True
        self._flag[0] = b"\1"

    def clear(self) -> None:
        self._flag[0] = b"\0"
        self._log.muted = False

    def update_batch_window(self, is_open: bool) -> None:
        """Before each step, open the batch window (or leave it open) if `is_open`, else close it."""
        self._window_start = (self._window_start or time.monotonic()) if is_open else None

    def in_batch_window(self) -> bool:
        """Whether the batch window is open, so that a new request should join the step being computed."""
        return self._window_start is not None and time.monotonic() - self._window_start < BATCH_WINDOW_S
