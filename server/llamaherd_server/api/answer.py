"""Turns a run of generations into an HTTP response: one JSON object, or a stream of server-sent events."""

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

# A stream that has been silent for this long sends a comment, so that proxies and clients do not close it as idle.
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
    """The format in which an endpoint writes its answer. Each chunk consists of complete server-sent events."""

    def chunk(self, index: int, event: Event) -> bytes:
        """Return the server-sent events for an engine event of choice `index`; empty if there is nothing to send."""

    def end(self, usage: Usage) -> bytes:
        """Return the events that follow the end of the last choice."""

    def error(self, error: ApiError) -> bytes:
        """Return the event that ends a failed stream."""

    def whole(self, choices: list[Choice], usage: Usage) -> Any:
        """Return the complete answer as one object, or as a response."""


def run_of(request: Request, requests: list[Generate], n: int = 1) -> Run:
    """Create the run of an HTTP request's generations; the `n` generations of each prompt are adjacent."""
    state = state_of(request)
    return Run(state.serving, request.state.key, requests, n=n, arrived=request.state.log.arrived)


async def answer(request: Request, run: Run, shape: Shape, *, stream: bool) -> Response:
    """Start the run and return its output as a response. Raises the errors that occur before a stream has begun."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(run)
        request.state.log.follow(run.usage, run.texts)
        if stream:
            await first_event(request.receive, run.first())
            return EventStream(_chunks(run, shape), stack.pop_all())
        choices = await unless_gone(request.receive, _collected(run))
        whole = shape.whole(choices, run.usage)
        return whole if isinstance(whole, Response) else json_response(whole)


async def first_event(receive: Receive, first: Awaitable[None]) -> None:
    """Wait up to KEEP_ALIVE_S for a stream's first event, so that an early failure can still set the HTTP status."""
    with suppress(TimeoutError):
        async with asyncio.timeout(KEEP_ALIVE_S):
            await unless_gone(receive, first)


def json_response(content: Any) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


class EventStream(Response):
    """Streams `chunks`, with comments as keep-alive. Closes `stack` when all is sent or the client has disconnected."""

    def __init__(self, chunks: AsyncIterator[bytes], stack: AsyncExitStack) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the latter disables nginx's buffering
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self._chunks = chunks
        self._stack = stack
        self._sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["log"].streamed = True
        async with self._stack:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            keep_alive = asyncio.create_task(self._keep_alive(send))
            try:
                await unless_gone(receive, self._send_all(send))
            except ClientDisconnect:
                scope["state"]["log"].client_gone = True
            finally:
                keep_alive.cancel()

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
    """Convert an exception to the error that ends a stream. Logs it if it is a bug."""
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
    """Return the result of `work`. If the client disconnects first, cancel it and raise ClientDisconnect."""
    result = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((result, disconnected), return_when=asyncio.FIRST_COMPLETED)
        if result.done():
            return result.result()
        raise ClientDisconnect
    finally:
        for task in (result, disconnected):
            task.cancel()
        await asyncio.gather(result, disconnected, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
