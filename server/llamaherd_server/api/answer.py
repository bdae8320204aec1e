"""Turns a run of generations into an HTTP answer: one JSON object, or server-sent events as they come."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec
import structlog
from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from llamaherd_server.api.state import state_of
from llamaherd_server.engine.base import Event
from llamaherd_server.errors import ApiError
from llamaherd_server.serving.generation import Run
from llamaherd_server.serving.meter import Usage
from llamaherd_server.wire.errors import EngineError
from llamaherd_server.wire.protocol import Delta, Finished, Generate, TokenLogprob

log = structlog.get_logger()
T = TypeVar("T")

# A stream that has nothing to tell for so long gets a comment, so that nothing on its way takes it for dead.
KEEP_ALIVE_S = 15.0
_KEEP_ALIVE = b": keep-alive\n\n"


@dataclass(frozen=True, slots=True)
class Choice:
    """One finished generation."""

    index: int
    deltas: list[Delta]
    end: Finished

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return [token for delta in self.deltas for token in delta.logprobs or ()]


class Shape(Protocol):
    """How an endpoint writes its answer. Chunks are whole `data:` events."""

    def chunk(self, index: int, event: Event) -> bytes:
        """The events for what came of choice `index`; empty: nothing to tell yet."""

    def end(self, usage: Usage) -> bytes:
        """The events that follow the last choice's end."""

    def error(self, error: ApiError) -> bytes:
        """The event that ends a stream which cannot go on."""

    def whole(self, choices: list[Choice], usage: Usage) -> Any:
        """The answer in one object."""


def run_of(request: Request, requests: list[Generate], n: int = 1) -> Run:
    """The run of an HTTP request's generations; the `n` of a prompt lie side by side."""
    state = state_of(request)
    return Run(state.serving, request.state.key, requests, n=n, arrived=request.state.log.arrived)


async def answer(request: Request, run: Run, shape: Shape, *, stream: bool) -> Response:
    """Start the run and answer with it; errors before the first token's slot are raised as ApiError."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(run)
        request.state.log.follow(run.usage, run.texts)
        if stream:
            await begun(request.receive, run.first())
            return EventStream(_chunks(run, shape), stack.pop_all())
        choices = await unless_gone(request.receive, _collected(run))
        return json_response(shape.whole(choices, run.usage))


async def begun(receive: Receive, first: Awaitable[None]) -> None:
    """Wait for a stream's first event, or for a while: a failure until then becomes the HTTP status."""
    with suppress(TimeoutError):
        async with asyncio.timeout(KEEP_ALIVE_S):
            await unless_gone(receive, first)


def json_response(content: Any) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


class EventStream(Response):
    """Sends `chunks`, and comments while there are none; leaves `stack` when the client has gone or all is sent."""

    def __init__(self, chunks: AsyncIterator[bytes], stack: AsyncExitStack) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the latter tells nginx to pass chunks on
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self._chunks = chunks
        self._stack = stack
        self._sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["log"].streamed = True
        async with self._stack:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            beside = asyncio.create_task(self._keep_alive(send))
            try:
                await unless_gone(receive, self._send_all(send))
            except ClientDisconnect:
                scope["state"]["log"].client_gone = True
            finally:
                beside.cancel()

    async def _keep_alive(self, send: Send) -> None:
        while True:
            before = self._sent
            await asyncio.sleep(KEEP_ALIVE_S)
            if self._sent == before:
                await send({"type": "http.response.body", "body": _KEEP_ALIVE, "more_body": True})

    async def _send_all(self, send: Send) -> None:
        async for chunk in self._chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            self._sent += 1
        self._sent += 1
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _chunks(run: Run, shape: Shape) -> AsyncIterator[bytes]:
    try:
        async for index, event in run.events():
            if chunk := shape.chunk(index, event):
                yield chunk
    except Exception as error:
        yield shape.error(error_of(error))
    else:
        yield shape.end(run.usage)


def error_of(error: Exception) -> ApiError:
    """The error that ends a stream which has begun."""
    if isinstance(error, ApiError | EngineError):
        return error if isinstance(error, ApiError) else ApiError.of_engine(error)
    log.error("internal error in a stream", exc_info=error)
    return ApiError(500, "internal error; the server's log has the details", code="internal")


async def _collected(run: Run) -> list[Choice]:
    deltas: defaultdict[int, list[Delta]] = defaultdict(list)
    choices: dict[int, Choice] = {}
    async for index, event in run.events():
        if isinstance(event, Delta):
            deltas[index].append(event)
        elif isinstance(event, Finished):
            choices[index] = Choice(index, deltas[index], event)
    return [choices[index] for index in sorted(choices)]


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """Do `work`; when the client goes away first, cancel it and raise ClientDisconnect."""
    doing = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((doing, gone), return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ClientDisconnect
    finally:
        for task in (doing, gone):
            task.cancel()
        await asyncio.gather(doing, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
