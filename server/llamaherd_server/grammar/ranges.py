"""Sets of characters as sorted ranges of code points that are neither overlapping nor adjacent."""

from __future__ import annotations

from collections.abc import Iterable

Ranges = tuple[tuple[int, int], ...]

LAST = 0x10FFFF


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Return the same characters as the fewest possible ranges, sorted."""
    result: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if result and low <= result[-1][1] + 1:
            result[-1] = (result[-1][0], max(high, result[-1][1]))
        else:
            result.append((low, high))
    return tuple(result)


def complement(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Return all other characters."""
    gaps, start = [], 0
    for low, high in merged(ranges):
        if low > start:
            gaps.append((start, low - 1))
        start = high + 1
    return (*gaps, (start, LAST)) if start <= LAST else tuple(gaps)


def common(some: Iterable[tuple[int, int]], others: Iterable[tuple[int, int]]) -> Ranges:
    """Return the characters in both sets."""
    return complement([*complement(some), *complement(others)])


def minus(some: Iterable[tuple[int, int]], others: Iterable[tuple[int, int]]) -> Ranges:
    """Return the characters of `some` that are not in `others`."""
    return complement([*complement(some), *merged(others)])


def classes_of(sets: Iterable[Ranges]) -> list[Ranges]:
    """Return the coarsest partition of the sets' union in which every set contains a class entirely or not at all."""
    changes: dict[int, set[int]] = {}
    for number, ranges in enumerate(sets):
        for low, high in ranges:
            changes.setdefault(low, set()).symmetric_difference_update({number})
            changes.setdefault(high + 1, set()).symmetric_difference_update({number})
    classes: dict[frozenset[int], list[tuple[int, int]]] = {}
    inside: frozenset[int] = frozenset()
    start = 0
    for code in sorted(changes):
        if inside:
            classes.setdefault(inside, []).append((start, code - 1))
        inside, start = inside ^ changes[code], code
    return [tuple(ranges) for ranges in classes.values()]
