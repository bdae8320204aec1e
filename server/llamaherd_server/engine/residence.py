"""Models on demand: they are loaded for the requests that name them, and share the room of a few.

One loads at a time, in the order they were asked for. Where the room is full, one that nobody uses gives way, the least
recently used first; else the one that was loaded first finishes what it has, and takes nothing new meanwhile. It stays
for as long as its loading took, so that models which are asked for by turns spend half of the time at work, at least.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import structlog

from llamaherd_server.wire.errors import EngineError

log = structlog.get_logger()

# Requests for a model that could not be loaded are refused for so long before it is tried again.
RETRY_S = 10.0
_TICK_S = 1.0
# What the task holds.
_holding: ContextVar[tuple[Guest, ...]] = ContextVar("holding", default=())


@dataclass(eq=False)
class Guest:
    """A model on demand. `load` raises EngineError; `users` are its requests, `waiting` those that it is loaded for."""

    name: str
    idle_s: float
    load: Callable[[], Awaitable[None]]
    unload: Callable[[], Awaitable[None]]
    here: bool = False
    loads: int = 0
    leaving: bool = False
    load_s: float = 0.0
    since: float = 0.0  # when it was loaded
    used: float = 0.0  # when its last request ended
    coming: asyncio.Task[None] | None = None
    refused: tuple[float, EngineError] | None = None  # until when, and with what, since it last could not be loaded
    users: set[object] = field(default_factory=set)
    waiting: set[object] = field(default_factory=set)
    unused: asyncio.Event = field(default_factory=asyncio.Event)


class Residence:
    """Room for `most` models on demand at once."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._guests: list[Guest] = []
        self._turn = asyncio.Lock()  # whoever loads or unloads

    def add(self, guest: Guest) -> None:
        self._guests.append(guest)

    @asynccontextmanager
    async def held(self, guest: Guest) -> AsyncIterator[None]:
        """The model is loaded, and stays so until the block ends; raises the EngineError of one that cannot be.

        Within a block of the same task it is held already, and whoever asks for room waits for the outer one.
        """
        outer = _holding.get()
        if guest in outer:
            yield
            return
        user = object()
        holding = _holding.set((*outer, guest))
        try:
            if guest.here and not guest.leaving:
                guest.users.add(user)
                guest.unused.clear()
            else:
                guest.waiting.add(user)
                await self._come(guest, user)
            yield
        finally:
            _holding.reset(holding)
            guest.waiting.discard(user)
            guest.users.discard(user)
            if not guest.users:
                guest.used = time.monotonic()
                guest.unused.set()

    async def run(self) -> None:
        """Unload, for ever, what nobody has used for its `idle_s`."""
        while True:
            await asyncio.sleep(_TICK_S)
            for guest in filter(_idle, self._guests):
                async with self._turn:
                    if _idle(guest):
                        await self._leave(guest)

    async def close(self, guest: Guest) -> None:
        """Load it no more; who waits for it gets an EngineError."""
        if guest.coming:
            guest.coming.cancel()
            await asyncio.wait((guest.coming,))
        guest.here = False

    async def _come(self, guest: Guest, user: object) -> None:
        if guest.refused and time.monotonic() < guest.refused[0]:
            raise guest.refused[1]
        guest.coming = coming = guest.coming or asyncio.create_task(self._bring(guest))
        await asyncio.wait((coming,))
        if user not in guest.users:
            raise guest.refused[1] if guest.refused else EngineError("engine_stopped", "the server is stopping")

    async def _bring(self, guest: Guest) -> None:
        try:
            async with self._turn:
                while sum(one.here for one in self._guests) >= self._most:
                    await self._make_room()
                await self._load(guest)
        finally:
            guest.coming = None

    async def _load(self, guest: Guest) -> None:
        began = time.monotonic()
        guest.refused = None
        try:
            await guest.load()
        except (EngineError, OSError) as error:
            refusal = EngineError("engine_stopped", f"model {guest.name!r} could not be loaded: {error}")
            guest.refused = (time.monotonic() + RETRY_S, refusal)
            log.error("model not loaded", model=guest.name, error=str(error))
            return
        guest.since = time.monotonic()
        guest.load_s = guest.since - began
        guest.here = True
        guest.loads += 1
        guest.users |= guest.waiting
        guest.waiting.clear()
        guest.unused.clear()
        log.info("model loaded", model=guest.name, load_s=round(guest.load_s, 2))

    async def _make_room(self) -> None:
        here = [one for one in self._guests if one.here]
        guest = min(here, key=lambda one: (bool(one.users), one.since if one.users else one.used))
        if guest.users:
            await asyncio.sleep(guest.since + guest.load_s - time.monotonic())
            guest.leaving = True
            await guest.unused.wait()
        await self._leave(guest)

    async def _leave(self, guest: Guest) -> None:
        guest.here = guest.leaving = False
        await guest.unload()
        log.info("model unloaded", model=guest.name)


def _idle(guest: Guest) -> bool:
    return guest.here and not guest.users and time.monotonic() - max(guest.used, guest.since) >= guest.idle_s
