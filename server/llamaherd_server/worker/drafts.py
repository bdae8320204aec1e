"""Prompt lookup: what followed when a sequence's last tokens came before, within the sequence itself, is likely next.

Source of the idea: github.com/apoorvumang/prompt-lookup-decoding; llama.cpp's `--spec-type ngram-*`.
"""

from __future__ import annotations

import math
from array import array

# How many tokens a match has: the longer one is looked for first, and below the shorter one nothing is proposed.
LONG, SHORT = 8, 3
# Entries of a table, 4 bytes each, and tokens that a call indexes: bounds of memory and of a step's time.
MOST_ENTRIES, INDEXED_AT_ONCE = 2**16, 512


class Lookup:
    """An index of one sequence's tokens, which only ever grow; `limit`: how many there may be.

    An entry gives way to a later one of the same hash, so that the latest occurrence is found, mostly.
    """

    def __init__(self, limit: int) -> None:
        size = min(1 << (2 * limit).bit_length(), MOST_ENTRIES)
        self._mask = size - 1
        self._after = array("i", bytes(4 * size))  # where an n-gram ended; 0: nowhere
        self._indexed = SHORT  # n-grams that end here or later have no entry yet
        self._source = 0  # where the last proposal was taken from
        self._proposed_at = 0

    def propose(self, tokens: list[int], most: int) -> list[int]:
        """At most `most` tokens that may come next; none while the index has not caught up with `tokens`."""
        if not self._catch_up(tokens):
            return []
        source = self._source + len(tokens) - self._proposed_at
        # A proposal that came true is gone on with: it matches more than any other does.
        if not (self._source and self._matches(tokens, source, SHORT)):
            source = self._find(tokens, LONG) or self._find(tokens, SHORT)
        self._source, self._proposed_at = source, len(tokens)
        if not source:
            return []
        draft = tokens[source : source + most]
        return (draft * math.ceil(most / len(draft)))[:most]  # what reaches the end is a period, and goes on as one

    def _catch_up(self, tokens: list[int]) -> bool:
        """Index the n-grams that something follows; whether all of them are."""
        start, end = self._indexed, min(len(tokens), self._indexed + INDEXED_AT_ONCE)
        for at in range(start, end):
            self._after[self._entry(tokens, at, SHORT)] = at
            if at >= LONG:
                self._after[self._entry(tokens, at, LONG)] = at
        self._indexed = max(start, end)
        return end == len(tokens)

    def _entry(self, tokens: list[int], end: int, length: int) -> int:
        return hash(tuple(tokens[end - length : end])) & self._mask

    def _find(self, tokens: list[int], length: int) -> int:
        end = len(tokens)
        if end <= length:
            return 0
        at = self._after[self._entry(tokens, end, length)]
        return at if at and self._matches(tokens, at, length) else 0

    @staticmethod
    def _matches(tokens: list[int], at: int, length: int) -> bool:
        return length <= at < len(tokens) and tokens[at - length : at] == tokens[-length:]
