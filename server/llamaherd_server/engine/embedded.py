"""The embedded engine: our worker process over libllama, restarted when it dies or stops speaking."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from llamaherd_server.engine.base import EngineError, EngineState, EngineStatus, Event
from llamaherd_server.engine.supervisor import Worker
from llamaherd_server.protocol import (
    Cancel,
    Delta,
    Detokenize,
    EngineSettings,
    Failed,
    Finished,
    FromWorker,
    Generate,
    Loading,
    ModelInfo,
    Ready,
    Retune,
    Retuned,
    Started,
    Stats,
    Step,
    Text,
    Tokenize,
    Tokens,
    ToWorker,
)

MAX_RESTARTS_IN_A_ROW = 5
BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 30.0
SETTLED_S = 60.0


@dataclass(eq=False)
class _Open:
    """A message that the worker has not answered to its end."""

    message: ToWorker
    answers: asyncio.Queue[Any]
    started: bool = False


class EmbeddedEngine:
    """Implements engine.base.Engine."""

    def __init__(
        self, model_path: Path, gpu_layers: int, settings: EngineSettings, *, heartbeat_timeout_s: float = 120
    ) -> None:
        self._path = model_path
        self._gpu_layers = gpu_layers
        self._settings = settings
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._state: EngineState = "loading"
        self._model: ModelInfo | None = None
        self._stats: Stats | None = None
        self._load_s: float | None = None
        self._last_error: str | None = None
        self._restarts = 0
        self._failures = 0
        self._ready_at = 0.0
        self._ids = itertools.count(1)
        self._open: dict[int, _Open] = {}
        self._worker: Worker | None = None
        self._ready = asyncio.Event()
        self._ended = asyncio.Event()
        self._listener: Callable[[Stats], None] = lambda _: None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        await self._spawn()
        self._background(self._watch())
        ended = asyncio.create_task(self._ended.wait())
        ready = asyncio.create_task(self._ready.wait())
        await asyncio.wait({ended, ready}, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        ready.cancel()
        if not self._ready.is_set():
            raise EngineError("internal", self._last_error or "the engine did not start")

    async def stop(self) -> None:
        self._state = "stopped"
        for task in self._tasks:
            task.cancel()
        self._fail_all(EngineError("engine_stopped", "the server is stopping"))
        if self._worker:
            await self._worker.end()

    def status(self) -> EngineStatus:
        worker = self._worker
        return EngineStatus(
            state=self._state,
            model=self._model,
            settings=self._settings,
            stats=self._stats,
            heartbeat_age_s=time.monotonic() - worker.heard if worker else 0.0,
            restarts=self._restarts,
            load_s=self._load_s,
            pid=worker.pid if worker else None,
            last_error=self._last_error,
        )

    def observe(self, listener: Callable[[Stats], None]) -> None:
        self._listener = listener

    async def generate(self, request: Generate) -> AsyncGenerator[Event, None]:
        call = self._call(msgspec.structs.replace(request, id=next(self._ids)))
        try:
            while True:
                event = await call.answers.get()
                if isinstance(event, EngineError):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            if self._open.pop(call.message.id, None) is not None:  # type: ignore[union-attr]
                self._send(Cancel(call.message.id))  # type: ignore[union-attr]

    async def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        answer: Tokens = await self._ask(Tokenize(next(self._ids), text, add_special, parse_special))
        return answer.tokens

    async def detokenize(self, tokens: list[int]) -> str:
        answer: Text = await self._ask(Detokenize(next(self._ids), tokens))
        return answer.text

    async def retune(self, settings: EngineSettings) -> EngineSettings:
        answer: Retuned = await self._ask(Retune(next(self._ids), settings))
        self._settings = answer.settings
        return answer.settings

    async def _ask(self, message: Any) -> Any:
        call = self._call(message)
        try:
            answer = await call.answers.get()
        finally:
            self._open.pop(message.id, None)
        if isinstance(answer, EngineError):
            raise answer
        return answer

    def _call(self, message: Any) -> _Open:
        if self._state in ("failed", "stopped"):
            raise EngineError("engine_stopped", self._last_error or "the engine is stopped")
        call = _Open(message, asyncio.Queue())
        self._send(message)  # first: what cannot be encoded must not be kept for the next worker
        self._open[message.id] = call
        return call

    def _send(self, message: ToWorker) -> None:
        """What cannot be sent now stays open, and goes to the next worker when that is ready."""
        if self._worker and self._state == "ready":
            self._worker.send(message)

    async def _spawn(self) -> None:
        config = {
            "path": str(self._path),
            "gpu_layers": self._gpu_layers,
            "settings": msgspec.to_builtins(self._settings),
        }
        self._worker = Worker(self._on_message, self._on_exit)
        await self._worker.start(msgspec.json.encode(config))

    def _on_message(self, message: FromWorker) -> None:
        if isinstance(message, Step):
            self._stats = message.stats
            self._listener(message.stats)
            for event in message.events:
                self._deliver(event)
        elif isinstance(message, Ready):
            self._on_ready(message)
        elif isinstance(message, Failed) and message.id == 0:
            self._last_error = message.message
            self._state = "failed"
        elif not isinstance(message, Loading):
            self._deliver(message)

    def _deliver(self, event: Started | Delta | Finished | Failed | Retuned | Tokens | Text) -> None:
        call = self._open.get(event.id)
        if call is None:
            return
        if isinstance(event, Started):
            call.started = True
        if isinstance(event, Finished | Failed):
            del self._open[event.id]
        call.answers.put_nowait(
            EngineError(event.code, event.message, event.param) if isinstance(event, Failed) else event
        )

    def _on_ready(self, message: Ready) -> None:
        self._state = "ready"
        self._model = message.model
        self._settings = message.settings
        self._load_s = message.load_s
        self._ready_at = time.monotonic()
        for call in self._open.values():
            self._send(call.message)
        self._ready.set()

    def _on_exit(self, reason: str) -> None:
        if self._state == "stopped":
            return
        if self._state == "failed":
            self._ended.set()
            self._fail_all(EngineError("engine_stopped", self._last_error or reason))
            return
        self._last_error = reason
        for call in [call for call in self._open.values() if call.started or not isinstance(call.message, Generate)]:
            del self._open[call.message.id]  # type: ignore[union-attr]
            call.answers.put_nowait(EngineError("engine_crashed", "the engine ended while it worked on this request"))
        self._failures = 1 if time.monotonic() - self._ready_at > SETTLED_S else self._failures + 1
        if self._failures > MAX_RESTARTS_IN_A_ROW or not self._ready.is_set():
            self._state = "failed"
            self._ended.set()
            self._fail_all(EngineError("engine_stopped", reason))
            return
        self._state = "restarting"
        self._restarts += 1
        self._background(self._restart())

    async def _restart(self) -> None:
        await asyncio.sleep(min(LONGEST_BACKOFF_S, BACKOFF_S * 2 ** (self._failures - 1)))
        await self._spawn()

    async def _watch(self) -> None:
        """A worker that owes an answer and does not speak is wedged: kill it, the rest follows from its end."""
        while True:
            await asyncio.sleep(1)
            worker = self._worker
            if worker and self._state == "ready" and time.monotonic() - worker.heard > self._heartbeat_timeout_s:
                worker.kill()

    def _fail_all(self, error: EngineError) -> None:
        for call in self._open.values():
            call.answers.put_nowait(error)
        self._open.clear()

    def _background(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        with contextlib.suppress(asyncio.CancelledError):
            task.result()
