"""uvicorn's HTTP/1.1 protocol, with a deadline for request headers and unchunked responses to HTTP/1.0 clients."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

# From the first byte of a request to the end of its headers.
HEAD_S = 30.0


class Protocol(HttpToolsProtocol):
    """A connection. It is closed after the keep-alive timeout even if it never sends a request."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn's signature
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._end_head()
        self._head_timer = self.loop.call_later(HEAD_S, self.timeout_keep_alive_handler)

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            self.cycle.send = _without_chunks(self.cycle)  # type: ignore[method-assign]

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def _without_chunks(cycle: RequestResponseCycle) -> Any:
    """Return a `send` for responses that end with the connection (https://github.com/encode/uvicorn/issues/1360)."""
    send = cycle.send

    async def plain(message: Any) -> None:
        cycle.chunked_encoding = False
        cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    return plain
