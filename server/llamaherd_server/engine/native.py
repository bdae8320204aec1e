"""The llama-server engine: the native binary of the same build, driven through its own HTTP API.

Unlike the embedded engine, it omits log probabilities of tokens that end inside a UTF-8 character, evaluates no given
texts, combines no reasoning budget with a grammar, never preempts, and shares cached prefixes among all keys.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec

from llamaherd_server.config.settings import SettingsError
from llamaherd_server.engine.base import MAX_ATTEMPTS, EngineStatus, Event, OwnApi
from llamaherd_server.engine.flags import flags, unknown
from llamaherd_server.engine.native_api import completion_body, error_of, events_of
from llamaherd_server.engine.native_process import NativeProcess
from llamaherd_server.engine.native_room import check_room
from llamaherd_server.engine.preparation import Preparation
from llamaherd_server.engine.supervisor import Supervisor
from llamaherd_server.wire.engine_settings import EngineSettings, Placement
from llamaherd_server.wire.errors import EngineError
from llamaherd_server.wire.evaluation import Evaluate, Evaluated
from llamaherd_server.wire.protocol import (
    Adapter,
    Embed,
    Embedded,
    FromWorker,
    Generate,
    Media,
    ModelInfo,
    NativeConfig,
    Ready,
    Sampling,
    Stats,
    Step,
)
from llamaherd_server.wire.sampling_values import BadValue, checked
from llamaherd_server.worker.forkserver import SHORT_CHARS

_EXIT_S = 1.0


class NativeEngine:
    """Implements engine.base.Engine."""

    def __init__(
        self,
        binary: Path,
        model_path: Path,
        settings: EngineSettings,
        *,
        placement: Placement | None = None,
        name: str,
        mmproj: Path | None = None,
        draft: Path | None = None,
        chat_template: Path | None = None,
        lora: list[Adapter] | None = None,
        rpc: list[str] | None = None,
        extra_args: list[str] | None = None,
        heartbeat_timeout_s: float = 120,
        load_timeout_s: float = 900,
    ) -> None:
        self._native = NativeConfig(
            name=name,
            binary=str(binary),
            path=str(model_path),
            settings=settings,
            placement=placement or Placement(),
            mmproj=None if mmproj is None else str(mmproj),
            draft=None if draft is None else str(draft),
            chat_template=None if chat_template is None else str(chat_template),
            lora=lora or [],
            rpc=rpc or [],
            extra_args=extra_args or [],
        )
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._load_timeout_s = load_timeout_s
        self._model: ModelInfo | None = None
        self._stats: Stats | None = None
        self._load_s: float | None = None
        self._listener: Callable[[Stats], None] = lambda _: None
        self._process = NativeProcess()
        self._supervisor = self._new_supervisor()
        self._changed = asyncio.Event()
        self._preparation = Preparation(model_path)

    def check_flags(self) -> None:
        """Raise SettingsError if the settings need a flag that this binary lacks."""
        try:
            lacking = unknown(flags(self._native, "socket"), self._native.binary)
        except ValueError as error:
            raise SettingsError(f"engine.binary: {error}") from None
        if lacking:
            remedy = "use a newer build of llama.cpp, or remove the settings that need it"
            raise SettingsError(f"{self._native.binary} has no {', '.join(lacking)}: {remedy}")

    @property
    def own_api(self) -> OwnApi:
        return self

    async def start(self) -> None:
        await check_room(self._native)
        await self._supervisor.start()
        if self._supervisor.state == "failed":
            raise EngineError("internal", self._supervisor.last_error or "llama-server did not start")

    async def stop(self) -> None:
        self._preparation.close()
        await self._supervisor.stop()
        self._notify_change()

    def status(self) -> EngineStatus:
        supervisor = self._supervisor
        return EngineStatus(
            kind="llama-server",
            state=supervisor.state,
            model=self._model,
            settings=self._native.settings,
            stats=self._stats,
            heartbeat_age_s=supervisor.heartbeat_age_s,
            restarts=supervisor.restarts,
            load_s=self._load_s,
            pid=supervisor.pid,
            last_error=supervisor.last_error,
        )

    def observe(self, listener: Callable[[Stats], None]) -> None:
        self._listener = listener

    async def generate(self, request: Generate) -> AsyncGenerator[Event, None]:
        request = msgspec.structs.replace(
            request, sampling=Sampling(**self._bounded(msgspec.structs.asdict(request.sampling)))
        )
        if request.reasoning and request.sampling.grammar:
            message = "llama-server supports no reasoning budget together with a grammar, a schema or a required tool"
            raise EngineError("unsupported", message)
        prompt: str | list[int] | dict[str, Any] = request.prompt
        if request.media is not None:
            prompt = await self._with_media(str(request.prompt), request.media)
        elif isinstance(prompt, str) and (not (request.add_special and request.parse_special) or self._is_long(prompt)):
            how = {"add_special": request.add_special, "parse_special": request.parse_special}
            prompt = await self._tokens(prompt, room=self._native.settings.ctx_per_slot, **how)
        asked = self.asked("/completion", completion_body(request, prompt))
        async with asked as response, aclosing(events_of(response, request)) as events:
            async for event in events:
                yield event

    async def _with_media(self, prompt: str, media: Media) -> dict[str, Any]:
        """Return the prompt in llama-server's format for media, without BOS, which llama-server adds itself."""
        marker = (await self.get("/props"))["media_marker"]
        if self._model is not None and self._model.add_bos:
            prompt = prompt.removeprefix(self._model.bos_token)
        return {"prompt_string": prompt.replace(media.marker, marker), "multimodal_data": media.data}

    async def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        return await self._tokens(text, add_special=add_special, parse_special=parse_special)

    async def count_tokens(self, text: str, *, add_special: bool = False) -> int:
        if self._is_long(text):
            return await self._preparation.count_tokens(text, add_special=add_special)
        return len(await self.tokenize(text, add_special=add_special))

    async def _tokens(self, text: str, *, add_special: bool, parse_special: bool, room: int | None = None) -> list[int]:
        if self._is_long(text):
            await self._serving()  # fail first if there will be no process to use the tokens
            return await self._preparation.tokenize(
                text, add_special=add_special, parse_special=parse_special, room=room
            )
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        tokens: list[int] = (await self._answer("/tokenize", body))["tokens"]
        return tokens

    async def detokenize(self, tokens: list[int]) -> str:
        return str((await self._answer("/detokenize", {"tokens": tokens}))["content"])

    async def pieces(self, tokens: list[int]) -> list[bytes]:
        answer = await self._answer("/tokenize", {"content": tokens, "with_pieces": True})
        pieces = [one["piece"] for one in answer["tokens"]]  # a list of bytes if it is not valid UTF-8
        return [piece.encode() if isinstance(piece, str) else bytes(piece) for piece in pieces]

    async def embed(self, question: Embed) -> Embedded:
        if question.query is not None:
            body = {"query": question.query, "documents": question.inputs}
            answer = await self._answer("/v1/rerank", body)
            scores = sorted((one["index"], one["relevance_score"]) for one in answer["results"])
            vectors = [[score] for _, score in scores]
        else:
            answer = await self._answer("/v1/embeddings", {"input": question.inputs})
            vectors = [one["embedding"] for one in sorted(answer["data"], key=lambda one: one["index"])]
        return Embedded(
            question.id, [array("f", vector).tobytes() for vector in vectors], answer["usage"]["prompt_tokens"]
        )

    async def evaluate(self, question: Evaluate) -> Evaluated:
        """Raise EngineError: llama-server returns probabilities of generated tokens only, not of a prompt's."""
        del question
        message = "llama-server returns no log probabilities of given texts: use engine embedded"
        raise EngineError("unsupported", message, "engine")

    async def retune(self, settings: EngineSettings) -> EngineSettings | None:
        """Check that another llama-server with these settings would fit; its flags cannot be changed while it runs."""
        await check_room(msgspec.structs.replace(self._native, settings=settings), beside=self._native)
        return None

    # --- llama-server's own API -----------------------------------------------------------------------------------

    async def get(self, path: str) -> Any:
        response = await self._sent("GET", path, None)
        await response.aread()
        await response.aclose()
        return response.json()

    @asynccontextmanager
    async def asked(self, path: str, body: dict[str, Any]) -> AsyncIterator[httpx.Response]:
        if isinstance(grammar := body.get("grammar"), str) and grammar:
            await self._preparation.try_grammar(grammar)
        response = await self._sent("POST", path, self._bounded(body))
        try:
            yield response
        except httpx.TransportError:
            if self._supervisor.state == "stopped":
                raise EngineError("engine_stopped", "the server is stopping") from None
            raise EngineError("engine_crashed", "the engine ended while it worked on this request") from None
        finally:
            await response.aclose()

    def _is_long(self, text: str) -> bool:
        return len(text) > SHORT_CHARS and self._preparation.possible

    def _bounded(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the body with sampling values within llama.cpp's limits; raises EngineError."""
        n_vocab = self._model.n_vocab if self._model else 2**31
        try:
            return checked(body, n_vocab=n_vocab, context=self._native.settings.ctx_per_slot)
        except BadValue as error:
            raise EngineError("invalid_value", str(error), error.field) from None

    async def _answer(self, path: str, body: dict[str, Any]) -> Any:
        async with self.asked(path, body) as response:
            await response.aread()
            return response.json()

    async def _sent(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        """Return the unread 200 response, after MAX_ATTEMPTS at most if processes die before it; raises EngineError."""
        for _ in range(MAX_ATTEMPTS):
            process = await self._serving()
            request = process.http.build_request(method, path, json=body)
            try:
                response = await process.http.send(request, stream=True)
            except (httpx.TransportError, RuntimeError):  # RuntimeError: the client was closed in the meantime
                await process.exited(_EXIT_S)
                continue
            if response.status_code == 200:
                return response
            await response.aread()
            await response.aclose()
            raise error_of(response.text)
        raise EngineError("engine_crashed", "the engine ended before it started this request")

    async def _serving(self) -> NativeProcess:
        """Wait for a process that accepts requests and return it; raises EngineError if there will be none soon."""
        while self.status().state != "ready" or not self._process.alive:
            if refusal := self._supervisor.refusal:
                raise EngineError("engine_stopped", refusal)
            await self._wait_for_change()
        return self._process

    # --- callbacks of the supervisor -------------------------------------------------------------------------------

    def on_ready(self, ready: Ready) -> None:
        self._model = ready.model
        self._load_s = ready.load_s
        self._notify_change()

    def on_message(self, message: FromWorker) -> None:
        if isinstance(message, Step):
            self._stats = message.stats
            self._listener(message.stats)

    def on_gone(self) -> None:
        self._notify_change()

    def _new_supervisor(self) -> Supervisor:
        def new_process() -> NativeProcess:
            self._process = NativeProcess()
            return self._process

        config = partial(msgspec.json.encode, self._native)
        return Supervisor(config, self, self._heartbeat_timeout_s, new_process, self._load_timeout_s)

    def _notify_change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _wait_for_change(self) -> None:
        await self._changed.wait()
