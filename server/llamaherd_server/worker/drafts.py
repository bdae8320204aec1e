"""Prompt lookup: drafts the tokens that followed an earlier occurrence of a sequence's last tokens in itself.

Source of the idea: github.com/apoorvumang/prompt-lookup-decoding; llama.cpp's `--spec-type ngram-*`.
"""

from __future__ import annotations

import math
from array import array

# Lengths of a match, in tokens: LONG_MATCH is tried first, and nothing shorter than SHORT_MATCH counts.
LONG_MATCH, SHORT_MATCH = 8, 3
# Entries of 4 bytes in a table, which limits memory, and tokens that one call indexes, which limits its time.
MAX_ENTRIES, MAX_INDEXED_PER_CALL = 2**16, 512


class Lookup:
    """An n-gram index of one sequence's tokens, to which tokens are only ever appended, up to `limit`.

    A later entry with the same hash overwrites an earlier one, so usually the latest occurrence is found.
    """

    def __init__(self, limit: int) -> None:
        size = min(1 << (2 * limit).bit_length(), MAX_ENTRIES)
        self._mask = size - 1
        self._after = array("i", bytes(4 * size))  # position after an n-gram; 0: none
        self._indexed = SHORT_MATCH  # n-grams that end here or later have no entry yet
        self._source = 0  # position that the last proposal starts at
        self._proposed_at = 0

    def propose(self, tokens: list[int], most: int) -> list[int]:
        """Up to `most` tokens that are likely to come next; none while the index lags behind `tokens`."""
        if not self._catch_up(tokens):
            return []
        source = self._source + len(tokens) - self._proposed_at
        # Continue an accepted proposal: it matches more tokens than a new one would.
        if not (self._source and self._matches(tokens, source, SHORT_MATCH)):
            source = self._find(tokens, LONG_MATCH) or self._find(tokens, SHORT_MATCH)
        self._source, self._proposed_at = source, len(tokens)
        if not source:
            return []
        draft = tokens[source : source + most]
        return (draft * math.ceil(most / len(draft)))[:most]  # reaching the end means the text is periodic

    def _catch_up(self, tokens: list[int]) -> bool:
        """Index the n-grams that have a successor; return whether all of them are indexed now."""
        start, end = self._indexed, min(len(tokens), self._indexed + MAX_INDEXED_PER_CALL)
        for at in range(start, end):
            self._after[self._entry(tokens, at, SHORT_MATCH)] = at
            if at >= LONG_MATCH:
                self._after[self._entry(tokens, at, LONG_MATCH)] = at
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
