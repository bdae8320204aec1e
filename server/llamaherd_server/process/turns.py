"""Places for costly work, shared among those who ask for it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar

# For whom work is done: the name of the request's key.
caller: ContextVar[str] = ContextVar("caller", default="")


class Turns:
    """`most` places, of which one caller never has the last ones, `left_for_others`."""

    def __init__(self, most: int, left_for_others: int) -> None:
        self._most = most
        self._most_of_one = max(1, most - left_for_others)
        self._busy: Counter[str] = Counter()
        self._freed = asyncio.Condition()

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """A place, once there is one for this caller."""
        who = caller.get()
        async with self._freed:
            await self._freed.wait_for(lambda: self._free(who))
            self._busy[who] += 1
        try:
            yield
        finally:
            async with self._freed:
                self._busy[who] -= 1
                self._freed.notify_all()

    def _free(self, who: str) -> bool:
        return self._busy[who] < self._most_of_one and self._busy.total() < self._most
