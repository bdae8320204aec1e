"""Accounting of KV cells: how many each slot holds, which of them are shared, and how many are free."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from llamaherd_server.worker.backend import Backend, Checkpoint, Part
from llamaherd_server.worker.sequence import Sequence
from llamaherd_server.worker.texts import Stretch


@dataclass(eq=False, slots=True)
class Slot:
    """A sequence id of the context. Its cells hold a prefix of `tokens`, even after its sequence has finished.

    `checkpoints`, by length, are states to rewind to where truncating the cells is not enough. `kept` tokens are in the
    prompt cache already or must not go there.
    """

    number: int
    sequence: Sequence | None = None
    tokens: list[int] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)
    scope: str = ""  # cache scope of the requests that may share the cells
    used: int = 0  # the step at which its last request ended
    checkpoints: list[Checkpoint] = field(default_factory=list)
    kept: int = 0
    texts: list[Stretch] = field(default_factory=list)  # known texts and their positions in `tokens`

    @property
    def length(self) -> int:
        return len(self.cells)

    def vacate(self, step: int) -> None:
        """Remove the sequence. Its cells stay for prompts that share the prefix, and may go to the prompt cache."""
        if self.sequence and not self.sequence.request.cache_prompt:
            self.kept = self.length
        self.sequence, self.used = None, step


class KvCache:
    """All changes to cells go through here, so that the backend and the accounting stay in step.

    With unified KV, a shared cell counts once and is freed by the last slot that holds it. With split KV, it is copied.
    """

    def __init__(self, backend: Backend, before_loss: Callable[[Slot], None] = lambda _: None) -> None:
        """`before_loss` is called with each slot that is about to be evicted."""
        self._before_loss = before_loss
        self.slots = [Slot(number) for number in range(backend.settings.parallel)]
        self.size = self.free = backend.size
        self._backend = backend
        self._unified = backend.settings.kv_unified
        self._numbers = itertools.count()
        self._sharers: dict[int, int] = {}  # cell: how many slots share it, besides the first

    @property
    def used(self) -> int:
        return self.size - self.free

    @property
    def idle(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.sequence is None]

    def grow(self, slot: Slot, count: int) -> None:
        """Account for `count` tokens that the backend has added to the slot."""
        slot.cells.extend(itertools.islice(self._numbers, count))
        self.free -= count

    def usable(self, slot: Slot, length: int) -> int:
        """The longest prefix of the slot, up to `length`, from which it can be continued."""
        length = min(length, slot.length)
        if length == 0 or self._backend.keeps(slot.number, length):
            return length
        return max((position for position, _ in slot.checkpoints if position <= length), default=0)

    def share(self, source: Slot, target: Slot, length: int) -> int:
        """Copy the first `length` positions of `source`, all `usable`, to empty `target`. Returns its new length."""
        kept = self._backend.keeps(source.number, length)
        self._backend.share(source.number, target.number, length)
        target.checkpoints = [one for one in source.checkpoints if one[0] <= length]
        if self._unified:
            target.cells = source.cells[:length]
            for cell in target.cells:
                self._sharers[cell] = self._sharers.get(cell, 0) + 1
        else:
            self.grow(target, length)
        return length if kept or self._rewind(target, length) else 0

    def cut(self, slot: Slot, length: int = 0) -> int:
        """Truncate the slot to the `usable` part of its first `length` positions. Returns the resulting length."""
        length = self.usable(slot, length)
        slot.checkpoints = [one for one in slot.checkpoints if one[0] <= length]
        slot.kept = min(slot.kept, length)
        if length == slot.length:
            return length
        kept = length == 0 or self._backend.keeps(slot.number, length)
        if kept:
            self._backend.forget(slot.number, length)
        self._release(slot, length)
        return length if kept or self._rewind(slot, length) else 0

    def reject(self, slot: Slot, length: int) -> None:
        """Drop the end of a draft, from `length` on, that the last batch added."""
        self._backend.reject(slot.number, length)
        self._release(slot, length)

    def load(self, slot: Slot, parts: list[Part], back: bytes | None, checkpoints: list[Checkpoint]) -> bool:
        """Load saved parts into the empty slot. Returns False and leaves it empty if the backend rejects them."""
        if not self._backend.load_parts(slot.number, parts, back):
            return False
        self.grow(slot, parts[-1][2])
        slot.checkpoints, slot.kept = checkpoints, slot.length
        return True

    def evict(self, *keep: Slot | None) -> bool:
        """Empty the least recently used idle slot. Returns False if there is none other than those to `keep`."""
        cached = [slot for slot in self.idle if slot.cells and slot not in keep]
        if not cached:
            return False
        slot = min(cached, key=lambda slot: slot.used)
        self._before_loss(slot)
        self.cut(slot)
        return True

    def _rewind(self, slot: Slot, length: int) -> bool:
        state = next(state for position, state in slot.checkpoints if position == length)
        if self._backend.rewind(slot.number, length, state):
            return True
        slot.checkpoints, slot.kept = [], 0
        self._release(slot, 0)
        return False

    def _release(self, slot: Slot, length: int) -> None:
        released = slot.cells[length:]
        del slot.cells[length:]
        for cell in released:
            others = self._sharers.pop(cell, 0)
            if others > 1:
                self._sharers[cell] = others - 1
            self.free += others == 0
