"""Select the highest logits, so that a sampler chain that keeps only a few need not process the whole vocabulary.

Needs numpy, so this is imported only where there are so many logits that it pays off.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

DEPTH_BITS = 5
DEPTH = 2**DEPTH_BITS  # logits in a column, which its highest one represents
GROUP_COLUMNS, MIN_GROUP_RATIO = 8, 2  # columns per group, and fewest groups per wanted logit for grouping
ENTRY = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data


class Best:
    """The highest logits of each row, and a few more, as llama_token_data."""

    def __init__(self, address: int, n_vocab: int, wanted: Sequence[tuple[int, Collection[int]]]) -> None:
        """`wanted`: for each row at `address`, how many logits (at most 1 in DEPTH), and tokens to add in any case."""
        rows, width = len(wanted), n_vocab // DEPTH
        logits = _array(address, rows, n_vocab)
        # At least as many column maxima reach `threshold` as logits are wanted, so at least as many logits do.
        columns = logits[:, : DEPTH * width].reshape(rows, DEPTH, width)
        highest = columns.max(axis=1)
        threshold = _thresholds(highest, [count for count, _ in wanted])[:, None]
        row, column = divmod(np.flatnonzero(highest >= threshold), width)
        found = np.flatnonzero(columns[row, :, column] >= threshold[row])
        at, depth = found >> DEPTH_BITS, found & (DEPTH - 1)
        place = row[at] * n_vocab + depth * width + column[at]
        others = [number * n_vocab + token for number, (_, tokens) in enumerate(wanted) for token in tokens]
        if others or DEPTH * width < n_vocab:
            row, beyond = np.nonzero(logits[:, DEPTH * width :] >= threshold)
            beyond += row * n_vocab + DEPTH * width
            place = np.unique(np.concatenate([place, beyond, np.array(others, np.int64)]))
        row, token = divmod(place, n_vocab)
        self._entries = np.zeros(len(place), ENTRY)
        self._entries["id"], self._entries["logit"] = token, logits.ravel()[place]
        self._address = self._entries.ctypes.data
        self._starts = np.searchsorted(row, np.arange(rows + 1)).tolist()
        keys = (row << 32) + (self._entries["logit"] + np.float32(0)).view(np.uint32)
        keys.sort()
        self._has_ties = bool((keys[1:] == keys[:-1]).any())

    def entries(self, row: int) -> tuple[int, int] | None:
        """The address and number of the row's entries; valid as long as this object exists.

        None if two logits are equal, because llama.cpp's order of ties depends on all logits, and None if they are NaN.
        """
        start, end = self._starts[row : row + 2]
        if start == end or (self._has_ties and len({*self._entries["logit"][start:end].tolist()}) < end - start):
            return None
        return self._address + start * ENTRY.itemsize, end - start


def _array(address: int, rows: int, columns: int) -> NDArray[np.float32]:
    shape, kind = (rows, columns), np.dtype(np.float32).str
    memory = {"data": (address, True), "shape": shape, "typestr": kind, "version": 3}
    array: NDArray[np.float32] = np.asarray(SimpleNamespace(__array_interface__=memory))
    return array


def _thresholds(highest: NDArray[np.float32], counts: list[int]) -> NDArray[np.float32]:
    """A close lower bound of the `counts[row]`-th highest value of each row; cheaper than a full sort."""
    rows, width = highest.shape
    if width >= GROUP_COLUMNS * MIN_GROUP_RATIO * max(counts):
        highest = highest[:, : width // GROUP_COLUMNS * GROUP_COLUMNS].reshape(rows, GROUP_COLUMNS, -1).max(axis=1)
    ordered = np.sort(highest, axis=1)
    return ordered[np.arange(rows), np.negative(counts)]
