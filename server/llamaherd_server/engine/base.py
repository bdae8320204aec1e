"""The Engine protocol: all that the front end knows of an engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import httpx

from llamaherd_server.wire.engine_settings import EngineKind, EngineSettings
from llamaherd_server.wire.evaluation import Evaluate, Evaluated
from llamaherd_server.wire.protocol import Delta, Embed, Embedded, Finished, Generate, ModelInfo, Started, Stats

EngineState = Literal["loading", "ready", "restarting", "failed", "stopped", "unloaded"]
Event = Started | Delta | Finished
# How many processes a request may lose before its answer begins: beyond that it may be what they die of.
LIVES = 2


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A snapshot for /readyz, /metrics and /admin/engine. `heartbeat_age_s` is the time since the last step.

    `intake_age_s` is how long what takes requests in has not answered; 0: it has. A model on demand is `unloaded` until
    it answers, and has been loaded `loads` times.
    """

    kind: EngineKind
    state: EngineState
    model: ModelInfo | None
    settings: EngineSettings
    stats: Stats | None
    heartbeat_age_s: float
    restarts: int
    load_s: float | None
    pid: int | None
    last_error: str | None
    intake_age_s: float = 0.0
    loads: int = 1


class OwnApi(Protocol):
    """The HTTP API of llama-server."""

    async def get(self, path: str) -> Any:
        """The JSON that a GET is answered with; raises EngineError."""

    def asked(self, path: str, body: dict[str, Any]) -> AbstractAsyncContextManager[httpx.Response]:
        """A 200 whose body is still to be read; raises EngineError, then too. Leaving it cancels the work."""


class Engine(Protocol):
    """A model behind a supervised process. Requests that were queued outlive a crash; running ones get an error."""

    @property
    def own_api(self) -> OwnApi | None:
        """What requests of llama-server's own form are passed on to; None: the engine has no such API."""

    async def start(self) -> None:
        """Start the process and return when the model answers; raises EngineError when it never will."""

    async def stop(self) -> None:
        """End the process; requests still running fail with `engine_stopped`."""

    def status(self) -> EngineStatus: ...

    def observe(self, listener: Callable[[Stats], None]) -> None:
        """Call `listener` with the stats of every step from now on."""

    def generate(self, request: Generate) -> AsyncGenerator[Event, None]:
        """Yield Started, Deltas, then Finished; raises EngineError. Closing the generator early cancels the request.

        The engine assigns `request.id`. A request that had not started when the worker died is sent to the next one.
        """

    async def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """The text's tokens; raises EngineError, for more than MOST_TOKENS too."""

    async def count_tokens(self, text: str, *, add_special: bool = False) -> int:
        """How many tokens the text has; raises EngineError."""

    async def detokenize(self, tokens: list[int]) -> str: ...

    async def pieces(self, tokens: list[int]) -> list[bytes]:
        """The bytes of each token, which may be a part of a character."""

    async def embed(self, question: Embed) -> Embedded:
        """Embeddings or scores; the engine assigns `question.id`, cancelling ends the work. Raises EngineError."""

    async def evaluate(self, question: Evaluate) -> Evaluated:
        """Log probabilities of given tokens; the engine assigns `question.id`, cancelling ends the work.

        Raises EngineError, `unsupported` where the engine has no way to tell them.
        """

    async def retune(self, settings: EngineSettings) -> EngineSettings:
        """Put other settings in force without reloading weights; raises EngineError and keeps the old ones."""
