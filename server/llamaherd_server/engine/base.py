"""The Engine protocol: everything the front end knows about an engine."""

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
# How many engine processes may die on a request before its answer begins. After that, the request may be the cause.
MAX_ATTEMPTS = 2


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A snapshot for /readyz, /metrics and /admin/engine. `heartbeat_age_s` is the time since the last step.

    `intake_age_s` is how long the thread that accepts requests has left a probe unanswered; 0 if none is pending. A
    model on demand is `unloaded` until it answers requests, and has been loaded `loads` times.
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
        """Return the JSON response of a GET; raises EngineError."""

    def asked(self, path: str, body: dict[str, Any]) -> AbstractAsyncContextManager[httpx.Response]:
        """POST and yield the unread 200 response; raises EngineError, also while it is read. Leaving cancels it."""


class Engine(Protocol):
    """A model in a supervised process. If the process crashes, queued requests survive and running ones fail."""

    @property
    def own_api(self) -> OwnApi | None:
        """The API to which requests in llama-server's own format are forwarded; None if the engine has none."""

    async def start(self) -> None:
        """Start the process and return when the model is ready; raises EngineError if the start fails."""

    async def stop(self) -> None:
        """Stop the process; requests that are still running fail with `engine_stopped`."""

    def status(self) -> EngineStatus: ...

    def observe(self, listener: Callable[[Stats], None]) -> None:
        """Call `listener` with the stats of every step from now on."""

    def generate(self, request: Generate) -> AsyncGenerator[Event, None]:
        """Yield Started, Deltas, then Finished; raises EngineError. Closing the generator early cancels the request.

        The engine assigns `request.id`. If the worker dies before the request has started, the next worker gets it.
        """

    async def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Return the tokens of the text; raises EngineError, also if there are more than MOST_TOKENS."""

    async def count_tokens(self, text: str, *, add_special: bool = False) -> int:
        """Return the number of tokens in the text; raises EngineError."""

    async def detokenize(self, tokens: list[int]) -> str: ...

    async def pieces(self, tokens: list[int]) -> list[bytes]:
        """Return the bytes of each token, which may end inside a UTF-8 character."""

    async def embed(self, question: Embed) -> Embedded:
        """Return embeddings or scores; raises EngineError. The engine assigns `question.id`; cancelling ends it."""

    async def evaluate(self, question: Evaluate) -> Evaluated:
        """Return log probabilities of given tokens. The engine assigns `question.id`; cancelling ends the work.

        Raises EngineError, with code `unsupported` if the engine cannot compute them.
        """

    async def retune(self, settings: EngineSettings) -> EngineSettings | None:
        """Apply other settings and return them; None if only a new process can have them.

        Raises EngineError and keeps the old ones if that fails, or if they do not fit into memory.
        """
