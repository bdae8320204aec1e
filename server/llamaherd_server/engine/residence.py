"""Models on demand: loaded when a request names them, a limited number at once.

They load one at a time, in the order of the requests. If all places are taken, the least recently used idle model is
unloaded. If no model is idle, the one loaded first drains and is unloaded, but not before it has been in memory as long
as its load took: models that are requested in turn thus serve at least half of the time.
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

# How long requests for a model are refused after it failed to load.
RETRY_S = 10.0
_TICK_S = 1.0
# The models that the current task keeps loaded.
_holding: ContextVar[tuple[Guest, ...]] = ContextVar("holding", default=())


@dataclass(eq=False)
class Guest:
    """A model on demand. `load` may raise EngineError. `users` are running requests, `waiting` those before a load."""

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
    refused: tuple[float, EngineError] | None = None  # after a failed load: until when to refuse, and the error
    users: set[object] = field(default_factory=set)
    waiting: set[object] = field(default_factory=set)
    unused: asyncio.Event = field(default_factory=asyncio.Event)


class Residence:
    """Keeps at most `most` models on demand loaded."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._guests: list[Guest] = []
        self._turn = asyncio.Lock()  # held during a load or an unload

    def add(self, guest: Guest) -> None:
        self._guests.append(guest)

    @asynccontextmanager
    async def held(self, guest: Guest) -> AsyncIterator[None]:
        """Load the model if necessary and keep it loaded until the block ends; raises EngineError if the load fails.

        Nested blocks of one task do nothing: the outer block keeps the model loaded.
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
        """Unload models that have been idle for their `idle_s`, until cancelled."""
        while True:
            await asyncio.sleep(_TICK_S)
            for guest in filter(_idle, self._guests):
                async with self._turn:
                    if _idle(guest):
                        await self._leave(guest)

    async def close(self, guest: Guest) -> None:
        """Cancel a load in progress; requests that wait for it get an EngineError."""
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
