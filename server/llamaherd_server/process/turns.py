"""Limits how much expensive work runs at once, in total and for one caller."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar

# Name of the key whose request is being served.
caller: ContextVar[str] = ContextVar("caller", default="")


class Turns:
    """A semaphore with `most` places, `left_for_others` of which a single caller cannot take."""

    def __init__(self, most: int, left_for_others: int) -> None:
        self._most = most
        self._most_per_caller = max(1, most - left_for_others)
        self._busy: Counter[str] = Counter()
        self._freed = asyncio.Condition()

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for a place for the current caller, and hold it until the block ends."""
        name = caller.get()
        async with self._freed:
            await self._freed.wait_for(lambda: self._free(name))
            self._busy[name] += 1
        try:
            yield
        finally:
            async with self._freed:
                self._busy[name] -= 1
                self._freed.notify_all()

    def _free(self, name: str) -> bool:
        return self._busy[name] < self._most_per_caller and self._busy.total() < self._most
