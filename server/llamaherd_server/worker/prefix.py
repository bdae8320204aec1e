"""Which KV cells hold the beginning of a prompt: those of finished requests, and of running ones too."""

from __future__ import annotations

from dataclasses import dataclass, field

from llamaherd_server.worker.sequence import Sequence

# Tokens: what is sooner computed than waited for, and than copied from slot to slot with split KV (the whole slot).
WORTH_WAITING = 16
WORTH_COPYING = 64


@dataclass(eq=False)
class Slot:
    """A sequence id of the context. `resident` are the tokens whose cells it holds after its last request."""

    number: int
    sequence: Sequence | None = None
    resident: list[int] = field(default_factory=list)
    used: int = 0

    @property
    def cells(self) -> list[int]:
        return self.sequence.tokens[: self.sequence.computed] if self.sequence else self.resident


def common(a: list[int], b: list[int]) -> int:
    """The length of the longest common beginning."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size
    low, high = 0, size
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def best_source(slots: list[Slot], sequence: Sequence) -> tuple[Slot | None, int]:
    """The slot whose cells begin most like the sequence, and how many. At least one token is left to compute."""
    if not sequence.request.cache_prompt:
        return None, 0
    tokens = sequence.tokens
    length, slot = max(
        ((min(common(slot.cells, tokens), len(tokens) - 1), slot) for slot in slots), key=lambda pair: pair[0]
    )
    return (slot, length) if length > 0 else (None, 0)


def being_computed(slots: list[Slot], sequence: Sequence, have: int) -> bool:
    """Whether a running prompt will soon hold a clearly longer beginning of the sequence than the `have` there are."""
    if not sequence.request.cache_prompt:
        return False
    tokens = sequence.tokens
    return any(
        other.sequence is not None
        and other.sequence.pending > 1
        and min(common(other.sequence.tokens, tokens), len(tokens) - 1) - have >= WORTH_WAITING
        for other in slots
    )
