"""Finding a slot, and the KV cells, for a sequence that waits."""

from __future__ import annotations

from dataclasses import dataclass

from llamaherd_server.worker.kv import KvCache, Slot
from llamaherd_server.worker.sequence import Sequence

# Cells that a sequence gets beyond its tokens before the next one is let in: whoever starts runs for a while.
AHEAD = 32


@dataclass(frozen=True, slots=True)
class Place:
    """A slot for a sequence, and the slot whose first `length` cells it can begin with (perhaps the same)."""

    target: Slot
    source: Slot | None
    length: int


def find_place(kv: KvCache, sequence: Sequence, source: Slot | None, length: int, least: int = 1) -> Place | None:
    """Where `sequence` goes, given the best `source` for its beginning; cached prefixes make way, oldest first.

    A prefix of fewer than `least` tokens is not copied, but taken over in a slot that loses little or makes way anyway.
    None: not while the others run. Alone a sequence always finds a place.
    """
    idle = kv.idle
    if not idle:
        return None
    target = min(idle, key=lambda slot: (slot.length > 0, slot.used))
    # A source's own cells serve best where nothing of them is lost, or where some must be given up anyway; where the
    # prefix is too short to be copied, where most of them stay.
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
    """The cells that a sequence will hold before long."""
    return min(len(sequence.tokens) + AHEAD, sequence.limit)


def _freed(target: Slot, source: Slot | None, length: int) -> int:
    return target.length - (length if target is source else 0)
