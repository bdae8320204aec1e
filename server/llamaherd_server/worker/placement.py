"""Finds a slot and KV cells for a waiting sequence."""

from __future__ import annotations

from dataclasses import dataclass

from llamaherd_server.worker.kv import KvCache, Slot
from llamaherd_server.worker.sequence import Sequence

# Free cells required beyond each sequence's tokens before another starts, so that none is preempted right away.
LOOKAHEAD_CELLS = 32


@dataclass(frozen=True, slots=True)
class Place:
    """A slot for a sequence, and the slot (possibly the same) whose first `length` cells it can reuse."""

    target: Slot
    source: Slot | None
    length: int


def find_place(kv: KvCache, sequence: Sequence, source: Slot | None, length: int, least: int = 1) -> Place | None:
    """Find a slot for `sequence`, given the best `source` of its prefix; evicts cached prefixes, oldest first.

    A prefix of fewer than `least` tokens is never copied, only reused in its own slot if that loses few other cells.
    Returns None if the cells do not suffice while others run. A sequence alone always finds a place.
    """
    idle = kv.idle
    if not idle:
        return None
    target = min(idle, key=lambda slot: (slot.length > 0, slot.used))
    # Reuse the source's own slot if that loses none of its cells, or if every idle slot would lose some; with a prefix
    # too short to copy, if at least half of the cells remain.
    if source in idle and (
        source.length == length or (target.length if length >= least else 2 * length >= source.length)
    ):
        target = source
    elif length < least and source is not target:
        source, length = None, 0
    running = [slot.sequence for slot in kv.slots if slot.sequence]
    wanted = sum(_claim(one) - one.computed for one in running) + _claim(sequence) - length
    while kv.free + _freed(target, source, length) < wanted:
        if kv.evict(target, source):
            continue
        if running:
            return None
        target = source or target
        break
    return Place(target, source, length)


def _claim(sequence: Sequence) -> int:
    """The cells that a sequence will soon hold."""
    return min(len(sequence.tokens) + LOOKAHEAD_CELLS, sequence.limit)


def _freed(target: Slot, source: Slot | None, length: int) -> int:
    return target.length - (length if target is source else 0)
