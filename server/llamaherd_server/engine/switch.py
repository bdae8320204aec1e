"""A model's current engine, and the one place that drains and replaces an engine.

It is replaced while requests wait, by one of the other kind or with settings that need another process. For a model on
demand, it is loaded and unloaded.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, nullcontext, suppress
from dataclasses import replace

from llamaherd_server.config.settings import Settings, SettingsError
from llamaherd_server.engine.about import read_model_info
from llamaherd_server.engine.base import Engine, EngineStatus, Event, OwnApi
from llamaherd_server.engine.residence import OnDemandModel, Residence
from llamaherd_server.wire.engine_settings import EngineKind, EngineSettings
from llamaherd_server.wire.errors import EngineError
from llamaherd_server.wire.evaluation import Evaluate, Evaluated
from llamaherd_server.wire.protocol import Embed, Embedded, Generate, ModelInfo, Stats

# How long a reconfiguration waits for running requests before it ends them.
RETUNE_DRAIN_S = 30.0


class Switch:
    """Implements engine.base.Engine by the current engine, `current`, which `make` creates from the settings."""

    def __init__(
        self, settings: Settings, make: Callable[[Settings], Engine], residence: Residence | None = None
    ) -> None:
        """`residence` is for models on demand. Raises what `make` raises."""
        self._settings = settings
        self._residence = residence
        self._on_demand_model = OnDemandModel(settings.model.name, settings.model.idle_s, self._load, self._unload)
        if residence:
            residence.add(self._on_demand_model)
        self._make = make
        self.current = make(settings)
        self._listener: Callable[[Stats], None] = lambda _: None
        self._model: ModelInfo | None = None
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._open = asyncio.Event()  # cleared while one engine replaces another
        self._open.set()
        self._changing = asyncio.Lock()
        self._stopped = False

    @property
    def own_api(self) -> OwnApi | None:
        return self.current.own_api

    @property
    def on_demand(self) -> bool:
        return self._residence is not None

    async def start(self) -> None:
        """Start the engine; for a model on demand, read its metadata only."""
        if self._residence:
            self._model = await read_model_info(self._settings)
        else:
            await self.current.start()

    async def stop(self) -> None:
        self._stopped = True
        self._open.set()
        if self._residence:
            await self._residence.close(self._on_demand_model)
        await self.current.stop()

    def status(self) -> EngineStatus:
        status = self.current.status()
        if self._residence and not self._stopped:
            status = replace(status, loads=self._on_demand_model.loads, model=status.model or self._model)
            if not self._on_demand_model.loaded:
                refused = self._on_demand_model.refused
                return replace(status, state="unloaded", last_error=refused[1].message if refused else None)
        return status if self._open.is_set() else replace(status, state="restarting", model=self._model)

    def held(self) -> AbstractAsyncContextManager[None]:
        """Keep the model loaded until the block ends; raises EngineError if a model on demand fails to load."""
        return self._residence.held(self._on_demand_model) if self._residence else nullcontext()

    async def _load(self) -> None:
        """Start a new engine of the same kind and with the same settings as the previous one."""
        before = self.current.status()
        try:
            self.current = self._make(self._settings.with_engine(before.kind, before.settings))
        except SettingsError as error:
            raise EngineError("invalid_value", str(error)) from None
        self.current.observe(self._listener)
        try:
            await self.current.start()
        except (EngineError, OSError):
            await self.current.stop()
            raise

    async def _unload(self) -> None:
        self._model = self.current.status().model or self._model
        await self.current.stop()

    def observe(self, listener: Callable[[Stats], None]) -> None:
        self._listener = listener
        self.current.observe(listener)

    async def generate(self, request: Generate) -> AsyncGenerator[Event, None]:
        begun = False
        while True:
            try:
                async with self.using() as engine, aclosing(engine.generate(request)) as events:
                    async for event in events:
                        begun = True
                        yield event
                return
            except _SwitchedAway:
                if begun:
                    raise

    async def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        async with self.using() as engine:
            return await engine.tokenize(text, add_special=add_special, parse_special=parse_special)

    async def count_tokens(self, text: str, *, add_special: bool = False) -> int:
        async with self.using() as engine:
            return await engine.count_tokens(text, add_special=add_special)

    async def detokenize(self, tokens: list[int]) -> str:
        async with self.using() as engine:
            return await engine.detokenize(tokens)

    async def pieces(self, tokens: list[int]) -> list[bytes]:
        async with self.using() as engine:
            return await engine.pieces(tokens)

    async def embed(self, question: Embed) -> Embedded:
        async with self.using() as engine:
            return await engine.embed(question)

    async def evaluate(self, question: Evaluate) -> Evaluated:
        async with self.using() as engine:
            return await engine.evaluate(question)

    @asynccontextmanager
    async def using(self) -> AsyncIterator[Engine]:
        """Wait for the current engine, loading the model if necessary, and keep it until the block ends.

        A switch to another engine waits for the block, at most RETUNE_DRAIN_S.
        """
        async with self.held():
            await self._open.wait()
            engine = self.current
            self._running += 1
            self._idle.clear()
            try:
                yield engine
            except EngineError as error:
                switched = engine is not self.current or not self._open.is_set()
                if switched and error.code in ("engine_stopped", "engine_crashed"):
                    raise _SwitchedAway from None
                raise
            finally:
                self._running -= 1
                if not self._running:
                    self._idle.set()

    @asynccontextmanager
    async def peeked(self) -> AsyncIterator[Engine | None]:
        """Like `using`, but yield None if the model is not loaded: a mere query must not load it."""
        if self.status().state == "unloaded":
            yield None
            return
        async with self.using() as engine:
            yield engine

    async def retune(self, settings: EngineSettings, kind: EngineKind | None = None) -> EngineSettings:
        """Apply other settings, on an engine of `kind`; raises EngineError and keeps the old ones if that fails.

        If the engine is replaced, new requests wait. Running ones get RETUNE_DRAIN_S to finish, then they fail with
        `engine_crashed`.
        """
        async with self.held(), self._changing:
            before = self.current.status()
            kind = kind or before.kind
            if kind == before.kind and (applied := await self.current.retune(settings)):
                return applied
            if before.state != "ready":
                raise EngineError("engine_stopped", f"the engine is {before.state}: retry once it is ready")
            try:
                former = self._make(self._settings.with_engine(before.kind, before.settings))
                other = self._make(self._settings.with_engine(kind, settings))
            except SettingsError as error:
                raise EngineError(
                    "invalid_value", f"this model cannot run on engine {kind!r}: {error}", "engine"
                ) from None
            self._model = before.model
            self._open.clear()
            try:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._idle.wait(), RETUNE_DRAIN_S)
                await self._put(other)
            except (EngineError, OSError) as error:
                await self._put(former)
                raise EngineError("does_not_fit", f"{kind} failed to start: {error}") from None
            finally:
                self._open.set()
            return self.current.status().settings

    async def _put(self, engine: Engine) -> None:
        """Stop the current engine and start this one in its place; raises what its start raises."""
        await self.current.stop()
        if self._stopped:
            raise EngineError("engine_stopped", "the server is stopping")
        self.current = engine
        engine.observe(self._listener)
        await engine.start()


class _SwitchedAway(EngineError):
    """Raised for a request whose engine was stopped by a switch."""

    def __init__(self) -> None:
        super().__init__("engine_crashed", "the engine ended while it worked on this request")
