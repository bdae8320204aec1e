"""The KV cache's books: which slot holds how many cells, which cells are shared, and how many are free."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from llamaherd_server.worker.backend import Backend
from llamaherd_server.worker.sequence import Sequence


@dataclass(eq=False, slots=True)
class Slot:
    """A sequence id of the context. Its cells hold the beginning of `tokens`, also when its sequence has finished."""

    number: int
    sequence: Sequence | None = None
    tokens: list[int] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)
    scope: str = ""  # whose requests may share the cells
    used: int = 0  # the step of its last request's end

    @property
    def length(self) -> int:
        return len(self.cells)


class KvCache:
    """Every change to the cells goes through here, to the backend and into the books at once.

    With unified KV a shared cell counts once, and is free when the last slot lets go of it; with split KV it is copied.
    """

    def __init__(self, backend: Backend) -> None:
        self.slots = [Slot(number) for number in range(backend.settings.parallel)]
        self.size = self.free = backend.size
        self._backend = backend
        self._unified = backend.settings.kv_unified
        self._numbers = itertools.count()
        self._sharers: dict[int, int] = {}  # cell: slots beside the first one

    @property
    def used(self) -> int:
        return self.size - self.free

    @property
    def idle(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.sequence is None]

    def grow(self, slot: Slot, count: int) -> None:
        """The backend has put `count` more tokens into the slot."""
        slot.cells.extend(itertools.islice(self._numbers, count))
        self.free -= count

    def share(self, source: Slot, target: Slot, length: int) -> None:
        """Give the empty `target` the first `length` cells of `source`."""
        self._backend.share(source.number, target.number, length)
        if not self._unified:
            self.grow(target, length)
            return
        target.cells = source.cells[:length]
        for cell in target.cells:
            self._sharers[cell] = self._sharers.get(cell, 0) + 1

    def cut(self, slot: Slot, length: int = 0) -> None:
        """Keep the slot's first `length` cells only."""
        gone = slot.cells[length:]
        if not gone:
            return
        self._backend.forget(slot.number, length)
        del slot.cells[length:]
        for cell in gone:
            others = self._sharers.pop(cell, 0)
            if others > 1:
                self._sharers[cell] = others - 1
            self.free += others == 0

    def evict(self, *keep: Slot | None) -> bool:
        """Empty the idle slot that was used least recently; False when there is none but those to `keep`."""
        cached = [slot for slot in self.idle if slot.cells and slot not in keep]
        if not cached:
            return False
        self.cut(min(cached, key=lambda slot: slot.used))
        return True
