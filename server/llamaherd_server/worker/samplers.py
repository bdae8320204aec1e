"""Samples a step's tokens: sequences in parallel, and from their highest logits alone where those suffice."""

from __future__ import annotations

import ctypes
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby
from typing import TYPE_CHECKING, Any

from llamaherd_server.wire.errors import RequestError
from llamaherd_server.worker.model import Model
from llamaherd_server.worker.sequence import Drawn, Row

if TYPE_CHECKING:
    from llamaherd_server.worker.best import Best

# Logits a step must be able to skip before numpy selects the highest ones, which takes 20 MiB and 0.1 ms. Those of a
# chain that changes logits count four times: skipping them saves that much more.
MIN_SKIPPED_LOGITS, CHANGED_WEIGHT = 160_000, 4
MIN_VOCABULARY = 2**13  # room for MAX_TOP_LOGITS columns of DEPTH logits (best.py)
MAX_THREADS = 8
MIN_PARALLEL_S, MIN_ROWS_PER_TASK = 0.001, 8  # work that threads pay off for; minimum rows of top logits per task
_WEIGHT = 0.1  # of the latest measurement in a moving average
FLOAT_BYTES, ENTRY_BYTES = 4, 12


class _Array(ctypes.Structure):
    """llama_token_data_array with an address instead of a pointer, which is cheaper to fill in."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("selected", ctypes.c_int64),
        ("sorted", ctypes.c_bool),
    )


class Draw:
    """The logits of `row`, which samplers draw tokens from, and one thread's native objects to do so.

    `entries`: address and number of the highest logits; None: draw from all.
    """

    row = 0
    entries: tuple[int, int] | None = None

    def __init__(self, model: Model, context: Any) -> None:
        self.context = context
        self._lib = lib = model.lib
        # Wraps every other chain: llama.cpp keeps a buffer for the whole vocabulary in the outermost one.
        self._outer = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        self._array = _Array()
        self._address = ctypes.addressof(self._array)
        self._apply = lib._lib["llama_sampler_apply"]
        self._apply.argtypes, self._apply.restype = (ctypes.c_void_p, ctypes.c_void_p), None

    def token(self, chain: Any) -> int:
        """Draw a token with the chain and add it to the chain's history."""
        if self.entries is not None:
            token = self.choice(chain)
            self._lib.llama_sampler_accept(chain, token)
            return token
        self._lib.llama_sampler_chain_add(self._outer, chain)
        try:
            return int(self._lib.llama_sampler_sample(self._outer, self.context, self.row))
        finally:
            self._lib.llama_sampler_chain_remove(self._outer, 0)

    def choice(self, chain: Any) -> int:
        """Choose one of the `entries` with the chain, without changing its history."""
        assert self.entries is not None  # noqa: S101 (the caller has checked)
        array = self._array
        (array.data, array.size), array.selected, array.sorted = self.entries, -1, False
        self._apply(chain, self._address)
        return ctypes.c_int32.from_address(array.data + ENTRY_BYTES * array.selected).value

    def close(self) -> None:
        self._lib.llama_sampler_free(self._outer)


class Samplers:
    """Samples for one context, on several threads: llama.cpp's chains are independent, ctypes releases the GIL."""

    def __init__(self, model: Model, context: Any, parallel: int, threads: int | None = None) -> None:
        """`threads` includes the calling one; None: one per core, at most MAX_THREADS and `parallel`."""
        self._context, self._n_vocab = context, model.n_vocab
        self._get_logits = model.lib._lib["llama_get_logits_ith"]
        self._get_logits.argtypes, self._get_logits.restype = (ctypes.c_void_p, ctypes.c_int32), ctypes.c_void_p
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = threads or min(cores, MAX_THREADS, parallel)
        self._draws = [Draw(model, context) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads, "sampler")
        self._top_s = self._full_s = 0.0  # per row of either kind
        self._best: type[Best] | None = None
        if parallel * model.n_vocab >= MIN_SKIPPED_LOGITS and model.n_vocab >= MIN_VOCABULARY:
            from llamaherd_server.worker.best import Best  # noqa: PLC0415 (see MIN_SKIPPED_LOGITS)

            self._best = Best

    def sample(self, rows: list[Row]) -> list[Drawn]:
        """Sample a token for each row, at most one per sequence; the result does not depend on the threads."""
        if not rows:
            return []
        # The first look-up waits for the device and reorders rows; later ones only read, so threads may share them.
        self._get_logits(self._context, rows[0][1])
        top = self._top_rows(rows)
        full = sorted({*range(len(rows))}.difference(top))
        parallelize = len(top) * self._top_s + len(full) * self._full_s > MIN_PARALLEL_S
        if not top and not parallelize:
            return self._draw_full(rows, self._draws[0])
        drawn: list[Drawn] = [None] * len(rows)
        share = max(MIN_ROWS_PER_TASK, -(-len(top) // len(self._draws)))
        tasks = deque[tuple[Callable[[list[Row], Draw], list[Drawn]], list[int]]]()
        tasks += ((self._draw_top, top[start : start + share]) for start in range(0, len(top), share))
        tasks += ((self._draw_full, [number]) for number in full)

        def work(draw: Draw) -> None:
            with suppress(IndexError):  # no tasks left
                while True:
                    task, numbers = tasks.popleft()
                    for number, token in zip(numbers, task([rows[one] for one in numbers], draw), strict=True):
                        drawn[number] = token

        helping = self._draws[1 : len(tasks)] if parallelize else []
        helpers = [self._pool.submit(work, draw) for draw in helping]
        work(self._draws[0])
        for helper in helpers:
            if not helper.cancel():  # waits only for those that have started
                helper.result()
        return drawn

    def close(self) -> None:
        self._pool.shutdown()
        for draw in self._draws:
            draw.close()

    def _top_rows(self, rows: list[Row]) -> list[int]:
        """Indices of the rows that need only their top logits; none if selecting these does not pay off."""
        top = [number for number, (sequence, _) in enumerate(rows) if self._best and sequence.sampler.top_logits]
        spared = sum(CHANGED_WEIGHT if rows[number][0].sampler.changed else 1 for number in top) * self._n_vocab
        return top if spared >= MIN_SKIPPED_LOGITS else []

    def _draw_top(self, rows: list[Row], draw: Draw) -> list[Drawn]:
        """Sample from the highest logits, selected at once for rows that are adjacent in memory."""
        assert self._best  # noqa: S101 (`_top_rows` has checked)
        began, size, drawn = time.perf_counter(), FLOAT_BYTES * self._n_vocab, list[Drawn]()
        places = [self._get_logits(self._context, row) for _, row in rows]
        for _, run in groupby(range(len(rows)), lambda number: places[number] - number * size):
            numbers = [*run]
            samplers = [rows[number][0].sampler for number in numbers]
            best = self._best(places[numbers[0]], self._n_vocab, [(one.top_logits, one.changed) for one in samplers])
            drawn += (_drawn(rows[number], draw, best.entries(at)) for at, number in enumerate(numbers))
        self._top_s += _WEIGHT * ((time.perf_counter() - began) / len(rows) - self._top_s)
        return drawn

    def _draw_full(self, rows: list[Row], draw: Draw) -> list[Drawn]:
        """Sample from all logits."""
        began = time.perf_counter()
        drawn = [_drawn(row, draw, None) for row in rows]
        self._full_s += _WEIGHT * ((time.perf_counter() - began) / len(rows) - self._full_s)
        return drawn


def _drawn(row: Row, draw: Draw, entries: tuple[int, int] | None) -> Drawn:
    draw.row, draw.entries = row[1], entries
    return outcome(row[0].sampler.sample, draw)


def outcome(sample: Callable[[Any], int | None], argument: Any) -> Drawn:
    """Return what `sample` returns, or the RequestError that it raises."""
    try:
        return sample(argument)
    except RequestError as error:
        return error
