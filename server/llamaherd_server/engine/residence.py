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
_holding: ContextVar[tuple[OnDemandModel, ...]] = ContextVar("holding", default=())


@dataclass(eq=False)
class OnDemandModel:
    """A model on demand. `load` may raise EngineError. `users` are running requests, `waiting` those before a load."""

    name: str
    idle_s: float
    load: Callable[[], Awaitable[None]]
    unload: Callable[[], Awaitable[None]]
    loaded: bool = False
    loads: int = 0
    draining: bool = False
    load_s: float = 0.0
    loaded_at: float = 0.0
    last_used_at: float = 0.0  # when its last request ended
    load_task: asyncio.Task[None] | None = None
    refused: tuple[float, EngineError] | None = None  # after a failed load: until when to refuse, and the error
    users: set[object] = field(default_factory=set)
    waiting: set[object] = field(default_factory=set)
    unused: asyncio.Event = field(default_factory=asyncio.Event)


class Residence:
    """Keeps at most `most` models on demand loaded."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._models: list[OnDemandModel] = []
        self._turn = asyncio.Lock()  # held during a load or an unload

    def add(self, model: OnDemandModel) -> None:
        self._models.append(model)

    @asynccontextmanager
    async def held(self, model: OnDemandModel) -> AsyncIterator[None]:
        """Load the model if necessary and keep it loaded until the block ends; raises EngineError if the load fails.

        Nested blocks of one task do nothing: the outer block keeps the model loaded.
        """
        outer = _holding.get()
        if model in outer:
            yield
            return
        user = object()
        holding = _holding.set((*outer, model))
        try:
            if model.loaded and not model.draining:
                model.users.add(user)
                model.unused.clear()
            else:
                model.waiting.add(user)
                await self._wait_for_load(model, user)
            yield
        finally:
            _holding.reset(holding)
            model.waiting.discard(user)
            model.users.discard(user)
            if not model.users:
                model.last_used_at = time.monotonic()
                model.unused.set()

    async def run(self) -> None:
        """Unload models that have been idle for their `idle_s`, until cancelled."""
        while True:
            await asyncio.sleep(_TICK_S)
            for model in filter(_idle, self._models):
                async with self._turn:
                    if _idle(model):
                        await self._unload(model)

    async def close(self, model: OnDemandModel) -> None:
        """Cancel a load in progress; requests that wait for it get an EngineError."""
        if model.load_task:
            model.load_task.cancel()
            await asyncio.wait((model.load_task,))
        model.loaded = False

    async def _wait_for_load(self, model: OnDemandModel, user: object) -> None:
        if model.refused and time.monotonic() < model.refused[0]:
            raise model.refused[1]
        model.load_task = task = model.load_task or asyncio.create_task(self._load_in_turn(model))
        await asyncio.wait((task,))
        if user not in model.users:
            raise model.refused[1] if model.refused else EngineError("engine_stopped", "the server is stopping")

    async def _load_in_turn(self, model: OnDemandModel) -> None:
        try:
            async with self._turn:
                while sum(one.loaded for one in self._models) >= self._most:
                    await self._make_room()
                await self._load(model)
        finally:
            model.load_task = None

    async def _load(self, model: OnDemandModel) -> None:
        began = time.monotonic()
        model.refused = None
        try:
            await model.load()
        except (EngineError, OSError) as error:
            refusal = EngineError("engine_stopped", f"model {model.name!r} could not be loaded: {error}")
            model.refused = (time.monotonic() + RETRY_S, refusal)
            log.error("model not loaded", model=model.name, error=str(error))
            return
        model.loaded_at = time.monotonic()
        model.load_s = model.loaded_at - began
        model.loaded = True
        model.loads += 1
        model.users |= model.waiting
        model.waiting.clear()
        model.unused.clear()
        log.info("model loaded", model=model.name, load_s=round(model.load_s, 2))

    async def _make_room(self) -> None:
        loaded = [one for one in self._models if one.loaded]
        model = min(loaded, key=lambda one: (bool(one.users), one.loaded_at if one.users else one.last_used_at))
        if model.users:
            await asyncio.sleep(model.loaded_at + model.load_s - time.monotonic())
            model.draining = True
            await model.unused.wait()
        await self._unload(model)

    async def _unload(self, model: OnDemandModel) -> None:
        model.loaded = model.draining = False
        await model.unload()
        log.info("model unloaded", model=model.name)


def _idle(model: OnDemandModel) -> bool:
    idle_s = time.monotonic() - max(model.last_used_at, model.loaded_at)
    return model.loaded and not model.users and idle_s >= model.idle_s
