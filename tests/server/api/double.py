"""An engine double that does what its test tells it: paced tokens, errors, a crash, a hang."""

from __future__ import annotations

import asyncio
import math
from array import array
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from functools import partial

from llamaherd_server.engine.base import EngineState, EngineStatus, Event, OwnApi
from llamaherd_server.wire.engine_settings import EngineKind, EngineSettings
from llamaherd_server.wire.errors import EngineError
from llamaherd_server.wire.evaluation import Evaluate, Evaluated, Evaluation
from llamaherd_server.wire.protocol import Delta, Embed, Embedded, Finished, Generate, ModelInfo, Started, Stats

MODEL = ModelInfo(
    description="double",
    architecture="double",
    n_params=1,
    size_bytes=1,
    n_ctx_train=2048,
    n_vocab=256,
    n_embd=1,
    add_bos=False,
    bos_token="<s>",
    eos_token="</s>",
    chat_template=None,
    build="double",
)


@dataclass
class Double:
    """Generates `tokens` words `pace_s` apart for every request; `script` may replace that for a request."""

    tokens: int = 3
    pace_s: float = 0.0
    model: ModelInfo = MODEL
    kind: EngineKind = "embedded"
    state: EngineState = "ready"
    settings: EngineSettings = field(default_factory=partial(EngineSettings, ctx_per_slot=2048))
    heartbeat_age_s: float = 0.0
    last_error: str | None = None
    script: Callable[[Generate], AsyncGenerator[Event, None]] | None = None
    refuse_start: EngineError | None = None
    seen: list[Generate] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    closed_early: int = 0

    @property
    def own_api(self) -> OwnApi | None:
        return None

    async def start(self) -> None:
        if self.refuse_start:
            raise self.refuse_start

    async def stop(self) -> None:
        self.state = "stopped"

    def observe(self, listener: Callable[[Stats], None]) -> None:
        self.listener = listener

    def status(self) -> EngineStatus:
        return EngineStatus(
            kind=self.kind,
            state=self.state,
            model=self.model,
            settings=self.settings,
            stats=None,
            heartbeat_age_s=self.heartbeat_age_s,
            restarts=0,
            load_s=0.0,
            pid=None,
            last_error=self.last_error,
        )

    async def generate(self, request: Generate) -> AsyncGenerator[Event, None]:
        self.seen.append(request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        events = (self.script or self._words)(request)
        done = False
        try:
            async for event in events:
                done = isinstance(event, Finished)
                yield event
        finally:
            self.closed_early += not done
            self.running -= 1

    async def _words(self, request: Generate) -> AsyncGenerator[Event, None]:
        yield Started(request.id, 5, 2)
        count = min(self.tokens, request.max_tokens or self.tokens)
        for number in range(count):
            await asyncio.sleep(self.pace_s)
            if self.state == "stopped":
                raise EngineError("engine_stopped", "the engine was stopped")
            yield Delta(id=request.id, text=f"w{number} ", n_tokens=1)
        yield finished(request, count)

    async def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        del parse_special
        return [*([1] if add_special else []), *text.encode()]

    async def count_tokens(self, text: str, *, add_special: bool = False) -> int:
        return len(await self.tokenize(text, add_special=add_special))

    async def detokenize(self, tokens: list[int]) -> str:
        return bytes(tokens).decode()

    async def pieces(self, tokens: list[int]) -> list[bytes]:
        return [bytes([token]) for token in tokens]

    async def embed(self, question: Embed) -> Embedded:
        await asyncio.sleep(self.pace_s)
        return Embedded(1, [array("f", [1.0]).tobytes() for _ in question.inputs], len(question.inputs))

    async def evaluate(self, question: Evaluate) -> Evaluated:
        """Each token is certain, and so is an x after the last."""
        self.evaluated = question
        made = [[*one.tokens[one.start :], ord("x")] for one in question.inputs]
        evaluations = [
            Evaluation(
                array("f", [0.0] * (len(tokens) - 1) + [math.nan]).tobytes(),
                array("i", [t for token in tokens for t in [token] * question.top]).tobytes(),
                array("f", [0.0] * len(tokens) * question.top).tobytes(),
            )
            for tokens in made
        ]
        return Evaluated(1, evaluations, {token: bytes([token]) for tokens in made for token in tokens})

    async def retune(self, settings: EngineSettings) -> EngineSettings | None:
        if settings.parallel > 64:
            raise EngineError("does_not_fit", f"parallel {settings.parallel} does not fit into memory", "parallel")
        self.settings = settings
        return settings


def finished(request: Generate, count: int) -> Finished:
    """The end of a generation of `count` tokens."""
    return Finished(
        id=request.id,
        reason="length" if count == request.max_tokens else "stop",
        prompt_tokens=5,
        cached_tokens=2,
        completion_tokens=count,
        prompt_s=0.01,
        decode_s=0.02,
    )
