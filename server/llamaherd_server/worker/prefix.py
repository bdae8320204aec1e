"""Finds the slot, of a finished or a running sequence, that holds a prefix of a prompt or will soon hold it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llamaherd_server.worker.kv import KvCache, Slot

# In tokens: a shorter prefix is recomputed rather than waited for.
MIN_TOKENS_TO_WAIT_FOR = 32


def common(a: list[int], b: list[int]) -> int:
    """The length of the longest common prefix."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:  # a[:low] and b[:low] are equal, a[:high] and b[:high] are not
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def best_source(kv: KvCache, slots: list[Slot], tokens: list[int]) -> tuple[Slot | None, int]:
    """Return the slot with the longest usable prefix of `tokens`, and the prefix's length.

    At least one token is left to compute, because its logits are needed.
    """
    most = len(tokens) - 1
    shared = [(kv.usable(slot, min(common(slot.tokens, tokens), most)), slot) for slot in slots]
    length, slot = max(shared, key=lambda pair: pair[0], default=(0, None))
    return (slot, length) if length else (None, 0)


def is_coming(slots: list[Slot], tokens: list[int], have: int) -> bool:
    """Whether a prompt being computed will soon hold a clearly longer prefix of `tokens` than `have` tokens."""
    most = len(tokens) - 1
    return any(
        slot.sequence is not None
        and not slot.sequence.decoding
        and min(common(slot.tokens, tokens), most) - have >= MIN_TOKENS_TO_WAIT_FOR
        for slot in slots
    )
