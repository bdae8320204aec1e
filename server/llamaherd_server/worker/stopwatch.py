"""Measures where a step's wall time goes, in seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Runs from its creation; `decode_s` and `sample_s` add up the time in `decoding()` and `sampling()`."""

    def __init__(self) -> None:
        self.decode_s = 0.0
        self.sample_s = 0.0
        self._began = time.perf_counter()

    @contextmanager
    def decoding(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.decode_s += time.perf_counter() - began

    @contextmanager
    def sampling(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.sample_s += time.perf_counter() - began

    def rest_s(self) -> float:
        """Time since the start that was spent in neither."""
        return time.perf_counter() - self._began - self.decode_s - self.sample_s
