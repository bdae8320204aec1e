"""A llama_batch that is filled one sequence at a time, not one token at a time."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any, Protocol


class Tokens(Protocol):
    """The first `computed` of `tokens` are in the cells of `slot`. The `pending` rest, followed by `draft`, is not."""

    draft: list[int]
    computed: int
    slot: int

    @property
    def tokens(self) -> list[int]: ...

    @property
    def pending(self) -> int: ...


class Batch:
    """Holds up to `capacity` tokens, each of one sequence. `native` is the struct that llama_decode takes."""

    def __init__(self, lib: Any, capacity: int) -> None:
        self._token: Any = (ctypes.c_int32 * capacity)()
        self._position: Any = (ctypes.c_int32 * capacity)()
        self._slot: Any = (ctypes.c_int32 * capacity)()
        self._output: Any = (ctypes.c_int8 * capacity)()
        one_each = (ctypes.c_int32 * capacity)(*[1] * capacity)
        pointer = ctypes.POINTER(ctypes.c_int32)
        first = ctypes.addressof(self._slot)
        size = ctypes.sizeof(ctypes.c_int32)
        slots = (pointer * capacity)(*(ctypes.cast(first + size * row, pointer) for row in range(capacity)))
        self.native = lib.llama_batch(0, self._token, None, self._position, one_each, slots, self._output)

    def fill(
        self, shares: Iterable[tuple[Tokens, int]], *, output_from: int | None = None, outputs: bool = True
    ) -> None:
        """Add the given number of tokens of each sequence: its pending ones, then those of its draft.

        Output rows are its last pending token, all of its draft, and every position from `output_from` on, if given;
        none without `outputs`.
        """
        row = 0
        for sequence, count in shares:
            start, end = sequence.computed, row + count
            known = min(count, sequence.pending)
            self._token[row:end] = [*sequence.tokens[start : start + known], *sequence.draft[: count - known]]
            self._position[row:end] = range(start, start + count)
            self._slot[row:end] = [sequence.slot] * count
            without_output = min(sequence.pending - 1, count)
            if output_from is not None:
                without_output = min(without_output, max(output_from - start, 0))
            self._output[row:end] = [0] * without_output + [outputs] * (count - without_output)
            row = end
        self.native.n_tokens = row

    def fill_rows(self, rows: Iterable[tuple[int, int, int]]) -> None:
        """Fill the batch with single tokens, each with its position and slot, all with an output row."""
        count = 0
        for count, (token, position, slot) in enumerate(rows, 1):
            row = count - 1
            self._token[row], self._position[row], self._slot[row], self._output[row] = token, position, slot, 1
        self.native.n_tokens = count
