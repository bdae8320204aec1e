"""The embedded engine: our worker process over libllama, and the requests that it has not finished yet."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypeVar

import msgspec

from llamaherd_server.engine.base import MAX_ATTEMPTS, EngineStatus, Event
from llamaherd_server.engine.process import WorkerProcess
from llamaherd_server.engine.prompt_store import Prompts, open_prompts
from llamaherd_server.engine.supervisor import Supervisor
from llamaherd_server.process.turns import caller
from llamaherd_server.wire.engine_settings import EngineSettings, Placement
from llamaherd_server.wire.errors import EngineError
from llamaherd_server.wire.evaluation import Evaluate, Evaluated
from llamaherd_server.wire.protocol import (
    Adapter,
    Cancel,
    Delta,
    Detokenize,
    Embed,
    Embedded,
    Failed,
    Finished,
    FromWorker,
    Generate,
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
    WorkerConfig,
)
from llamaherd_server.worker.channel import frame

Question: TypeAlias = Generate | Retune | Tokenize | Detokenize | Embed | Evaluate
Answer: TypeAlias = Started | Delta | Finished | Failed | Retuned | Tokens | Text | Embedded | Evaluated
PROBE_S = 1.0
T = TypeVar("T", Retuned, Tokens, Text, Embedded, Evaluated)


@dataclass(eq=False, slots=True)
class _Call:
    """A request to the worker that has not been fully answered."""

    question: Question
    frame: bytes
    answers: asyncio.Queue[Answer | EngineError] = field(default_factory=asyncio.Queue)
    started: bool = False
    attempts_left: int = MAX_ATTEMPTS

    def may_retry(self) -> bool:
        """Count a lost worker; return whether the request may go to the next one."""
        self.attempts_left -= 1
        return isinstance(self.question, Generate) and not self.started and self.attempts_left > 0


class EmbeddedEngine:
    """Implements engine.base.Engine."""

    own_api = None

    def __init__(
        self,
        model_path: Path,
        settings: EngineSettings,
        *,
        placement: Placement | None = None,
        draft: Path | None = None,
        chat_template: Path | None = None,
        lora: list[Adapter] | None = None,
        prompt_cache_mib: int | None = 0,
        prompt_cache_share: float = 1,
        prompt_cache_dir: Path | None = None,
        heartbeat_timeout_s: float = 120,
        load_timeout_s: float = 900,
    ) -> None:
        self._settings = settings
        self._worker = WorkerConfig(
            path=str(model_path),
            settings=settings,
            placement=placement or Placement(),
            draft=None if draft is None else str(draft),
            chat_template=None if chat_template is None else str(chat_template),
            lora=lora or [],
        )
        self._model: ModelInfo | None = None
        self._stats: Stats | None = None
        self._load_s: float | None = None
        self._listener: Callable[[Stats], None] = lambda _: None
        self._ids = itertools.count(1)
        self._open: dict[int, _Call] = {}
        self._probing: asyncio.Task[None] | None = None
        self._probed: float | None = None  # when the pending probe was sent; None: none is pending
        self._prompts = Prompts()
        self._open_prompts = partial(open_prompts, prompt_cache_mib, prompt_cache_share, prompt_cache_dir)
        self._supervisor = Supervisor(self._config, self, heartbeat_timeout_s, self._process, load_timeout_s)

    async def start(self) -> None:
        self._prompts = self._open_prompts()
        await self._supervisor.start()
        if self._supervisor.state == "failed":
            raise EngineError("internal", self._supervisor.last_error or "the engine did not start")
        self._probing = asyncio.create_task(self._probe())

    async def stop(self) -> None:
        if self._probing:
            self._probing.cancel()
        self._end(list(self._open.values()), EngineError("engine_stopped", "the server is stopping"))
        await self._supervisor.stop()
        await self._prompts.close()

    def status(self) -> EngineStatus:
        supervisor = self._supervisor
        return EngineStatus(
            kind="embedded",
            state=supervisor.state,
            model=self._model,
            settings=self._settings,
            stats=self._stats,
            heartbeat_age_s=supervisor.heartbeat_age_s,
            restarts=supervisor.restarts,
            load_s=self._load_s,
            pid=supervisor.pid,
            last_error=supervisor.last_error,
            intake_age_s=time.monotonic() - self._probed if self._probed else 0.0,
        )

    def observe(self, listener: Callable[[Stats], None]) -> None:
        self._listener = listener

    async def generate(self, request: Generate) -> AsyncGenerator[Event, None]:
        call = self._ask(msgspec.structs.replace(request, id=next(self._ids)))
        try:
            while not isinstance(event := await call.answers.get(), Finished):
                if isinstance(event, EngineError):
                    raise event
                if isinstance(event, Started | Delta):
                    yield event
            yield event
        finally:
            if self._open.pop(call.question.id, None):
                self._supervisor.send(frame(Cancel(call.question.id)))

    async def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        asked = Tokenize(next(self._ids), text, add_special, parse_special, owner=caller.get())
        return (await self._answer(asked, Tokens)).tokens

    async def count_tokens(self, text: str, *, add_special: bool = False) -> int:
        asked = Tokenize(next(self._ids), text, add_special, counted=True, owner=caller.get())
        return (await self._answer(asked, Tokens)).count

    async def pieces(self, tokens: list[int]) -> list[bytes]:
        return (await self._answer(Detokenize(next(self._ids), tokens, caller.get(), apart=True), Text)).pieces

    async def detokenize(self, tokens: list[int]) -> str:
        return (await self._answer(Detokenize(next(self._ids), tokens, caller.get()), Text)).text

    async def embed(self, question: Embed) -> Embedded:
        question = msgspec.structs.replace(question, id=next(self._ids), owner=caller.get())
        return await self._answer(question, Embedded)

    async def evaluate(self, question: Evaluate) -> Evaluated:
        return await self._answer(msgspec.structs.replace(question, id=next(self._ids)), Evaluated)

    async def retune(self, settings: EngineSettings) -> EngineSettings:
        return (await self._answer(Retune(next(self._ids), settings), Retuned)).settings

    # --- callbacks of the supervisor -----------------------------------------------------------------------------

    def on_ready(self, ready: Ready) -> None:
        self._model = ready.model
        self._settings = ready.settings
        self._load_s = ready.load_s
        for call in self._open.values():
            self._supervisor.send(call.frame)

    def on_message(self, message: FromWorker) -> None:
        if isinstance(message, Step):
            self._stats = message.stats
            self._listener(message.stats)
            for event in message.events:
                self._deliver(event)
        elif isinstance(message, Retuned):
            self._settings = message.settings
            self._deliver(message)
        elif isinstance(message, Started | Tokens | Text | Embedded | Evaluated | Failed):
            self._deliver(message)

    def on_gone(self) -> None:
        lost = [call for call in self._open.values() if not call.may_retry()]
        self._end(lost, EngineError("engine_crashed", "the engine ended while it worked on this request"))
        if refusal := self._supervisor.refusal:
            self._end(list(self._open.values()), EngineError("engine_stopped", refusal))

    async def _probe(self) -> None:
        """Tokenize an empty text every PROBE_S seconds, on the same path as all requests, for `intake_age_s`."""
        while True:
            self._probed = time.monotonic()
            with suppress(EngineError):
                await self.tokenize("")
            self._probed = None
            await asyncio.sleep(PROBE_S)

    # --- requests to the worker ----------------------------------------------------------------------------------

    def _config(self) -> bytes:
        config = msgspec.structs.replace(self._worker, settings=self._settings, prompts=self._prompts.config)
        return msgspec.json.encode(config)

    def _process(self) -> WorkerProcess:
        return WorkerProcess([self._prompts.fd] if self._prompts.config else [])

    async def _answer(self, question: Question, kind: type[T]) -> T:
        call = self._ask(question)
        try:
            answer = await call.answers.get()
        except asyncio.CancelledError:
            self._supervisor.send(frame(Cancel(question.id)))
            raise
        finally:
            self._open.pop(question.id, None)
        if isinstance(answer, EngineError):
            raise answer
        if not isinstance(answer, kind):
            raise TypeError(f"the worker answered {type(question).__name__} with {type(answer).__name__}")
        return answer

    def _ask(self, question: Question) -> _Call:
        """Send a request to the worker; without a ready worker, `on_ready` sends it to the next one."""
        if refusal := self._supervisor.refusal:
            raise EngineError("engine_stopped", refusal)
        try:
            call = self._open[question.id] = _Call(question, frame(question))
        except UnicodeEncodeError:
            raise EngineError("invalid_value", "the text contains an unpaired surrogate code point") from None
        self._supervisor.send(call.frame)
        return call

    def _deliver(self, answer: Answer) -> None:
        """Pass an answer to its caller, unless the caller has gone."""
        call = self._open.get(answer.id)
        if call is None:
            return
        if isinstance(answer, Started):
            call.started = True
        if isinstance(answer, Finished | Failed):
            del self._open[answer.id]
        if isinstance(answer, Failed):
            call.answers.put_nowait(EngineError(answer.code, answer.message, answer.param, answer.details))
        else:
            call.answers.put_nowait(answer)

    def _end(self, calls: list[_Call], error: EngineError) -> None:
        for call in calls:
            self._open.pop(call.question.id, None)
            call.answers.put_nowait(error)
