"""A streaming chat client on gevent that records when each event arrived.

It uses the parser and the pool of geventhttpclient, the library under Locust's FastHttpUser, but reads responses itself
(see `answer`): `FastHttpSession.iter_lines` waits for 1024-byte blocks, which shows up as late first tokens.
"""

from __future__ import annotations

import errno
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import gevent
import msgspec
from geventhttpclient.connectionpool import ConnectionPool, SSLConnectionPool
from geventhttpclient.response import HTTPParseError
from geventhttpclient.url import URL
from msgspec import Struct

from llamaherd_loadtest.answer import Answer, Pieces
from llamaherd_loadtest.samples import CLIENT, Sample
from llamaherd_loadtest.sse import END, Chunk, parse_line

clock = time.perf_counter
# A pool smaller than the load would silently queue requests in the client.
POOL = 65536
# Errors of the kernel when this machine, not the server, cannot open another connection.
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM}
PATH = "/v1/chat/completions"
_UNFINISHED = ("abort", "cancelled", "error")  # finish reasons of incomplete answers


class Target(Struct, frozen=True, kw_only=True):
    """Where the load goes: `url` is the API's root, with or without /v1.

    `ca` is the only trusted authority (None: the system's); `timeout_s` is per request.
    """

    url: str
    model: str = ""
    key: str = ""
    ca: Path | None = None
    timeout_s: float = 600.0


class ChatClient:
    """Streams chat completions over kept-alive connections; all greenlets of a process share one client."""

    def __init__(self, target: Target) -> None:
        """Raises ValueError if the URL, the key or the CA file is unusable."""
        self._timeout_s = target.timeout_s
        if not (target.key.isascii() and target.key.isprintable()):
            raise ValueError("the API key has characters that headers do not allow: use one line of printable ASCII")
        url = URL(target.url)
        self._prefix = url.path.rstrip("/").removesuffix("/v1")
        headers = [f"Host: {url.netloc}", "Content-Type: application/json", "Accept: text/event-stream"]
        self._head = "\r\n".join(headers + [f"Authorization: Bearer {target.key}"] * bool(target.key))
        try:
            self._pool = _pool(target)
        except (OSError, ssl.SSLError) as error:
            raise ValueError(f"cannot use CA file {target.ca}: {error}") from error

    def call(self, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Send a GET of `path`, or a POST of `body`, and return (status, body). Raises OSError without a response."""
        late = TimeoutError(f"no response to {path} within {self._timeout_s:g} s")
        try:
            with gevent.Timeout(self._timeout_s, late):
                answer = self._ask("POST" if body else "GET", path, body or b"")
        except HTTPParseError as error:
            raise OSError(str(error)) from error
        return answer.status_code, answer.body()

    def close(self) -> None:
        """Close the idle connections."""
        self._pool.close()

    def stream(self, body: bytes, sample: Sample, text: list[str] | None = None) -> None:
        """Send `body` and fill `sample` as the answer arrives; failures are recorded in `outcome` and never raised.

        If `text` is given, the answer's text is appended to it.
        """
        sample.sent = clock()
        recorder = _Recorder(sample, text)
        try:
            with gevent.Timeout(self._timeout_s):
                answer = self._ask("POST", PATH, body, recorder.take)
            recorder.finish(answer)
        except _StreamError as error:
            sample.outcome, sample.detail = "stream_error", str(error)
        except (gevent.Timeout, TimeoutError):
            sample.outcome, sample.detail = "timeout", f"not complete after {self._timeout_s:g} s"
        except (msgspec.MsgspecError, HTTPParseError) as error:
            # geventhttpclient reports a closed connection as a parse error too.
            gone = any(word in str(error) for word in ("closed", "Incomplete"))
            sample.outcome, sample.detail = "connection" if gone else "protocol", str(error)
        except OSError as error:
            sample.outcome = CLIENT if error.errno in _EXHAUSTED else "connection"
            sample.detail = str(error)
        sample.end = clock()

    def _ask(self, method: str, path: str, body: bytes, take: Callable[[Pieces], None] | None = None) -> Answer:
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._head}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection = self._pool.get_socket()
        connection.settimeout(None)  # the deadline is per request, not per read
        answer = Answer(connection, take)
        try:
            with suppress(BrokenPipeError, ConnectionResetError):  # a server that stops reading may have responded
                connection.sendall(head.encode() + body)
            answer.wait()
        finally:
            done = self._pool.release_socket if answer.should_close() else self._pool.return_socket
            done(connection)
        return answer


def _pool(target: Target) -> ConnectionPool:
    url = URL(target.url)
    secure = url.scheme == "https"
    where = url.host, url.port or (443 if secure else 80), url.host, url.port or 0
    timeout_s = min(10.0, target.timeout_s)
    if secure:
        trusted = {"ca_certs": str(target.ca)} if target.ca else {}
        return SSLConnectionPool(*where, ssl_options=trusted, size=POOL, connection_timeout=timeout_s)
    return ConnectionPool(*where, size=POOL, connection_timeout=timeout_s)


class _StreamError(Exception):
    """The server reported an error within the stream."""


class _Recorder:
    """Records the events of an answer in a sample."""

    def __init__(self, sample: Sample, text: list[str] | None) -> None:
        self._sample, self._text = sample, text
        self._rest = bytearray()
        self._last: Chunk | None = None
        self._finish_reason = ""
        self._size = self._first_size = 0  # characters of all events and of the first
        self._reasons = False

    def take(self, pieces: Pieces) -> None:
        """Raises _StreamError, and msgspec.DecodeError if an event is not the JSON of a chunk."""
        for arrival, piece in pieces:
            lines = (self._rest + piece).split(b"\n")
            self._rest = lines.pop()
            for line in lines:
                if line and (chunk := parse_line(line)) is not None:
                    self._record(chunk, arrival)

    def finish(self, answer: Answer) -> None:
        """Set the sample's outcome at the end of the answer."""
        sample = self._sample
        sample.first_share = self._first_size / max(self._size, 1)
        if answer.status_code != 200:
            sample.outcome, sample.detail = f"http {answer.status_code}", _error_text(answer.body())
            return
        self.take([(clock(), bytearray(b"\n"))])  # the last line may lack its newline
        if self._last is None or not (self._last is END or self._finish_reason):
            sample.outcome, sample.detail = "truncated", "the stream ended without a finish reason"
        elif self._finish_reason in _UNFINISHED:
            sample.outcome, sample.detail = "truncated", f"the server ended the answer early: {self._finish_reason}"
        elif sample.first is None:
            sample.outcome, sample.detail = "empty", "the answer had no text"

    def _record(self, chunk: Chunk, arrival: float) -> None:
        sample = self._sample
        if chunk.choices or chunk is END:
            self._last = chunk
            self._finish_reason = chunk.finish_reason or self._finish_reason
        if size := chunk.size:
            self._size += size
            self._reasons = self._reasons or chunk.reasons
            if sample.last is None:
                sample.first, self._first_size = arrival, size
            else:
                sample.gaps.append(arrival - sample.last)
            sample.last = arrival
            if self._text is not None:
                self._text.append(chunk.text)
        if chunk.is_error:
            raise _StreamError(chunk.error_message)
        if chunk.usage is not None:
            sample.prompt_tokens = chunk.usage.prompt_tokens
            sample.completion_tokens = chunk.usage.completion_tokens
            details = chunk.usage.completion_tokens_details
            if details is not None and not self._reasons:
                sample.hidden_tokens = details.reasoning_tokens or 0
            if chunk.usage.prompt_tokens_details is not None:
                sample.cached_tokens = chunk.usage.prompt_tokens_details.cached_tokens
        if chunk.timings is not None and chunk.timings.prompt_ms is not None:
            sample.prefill = chunk.timings.prompt_ms / 1000


def _error_text(body: bytes) -> str:
    try:
        return msgspec.json.decode(body, type=Chunk).error_message
    except msgspec.MsgspecError:
        return body[:200].decode("utf-8", "replace").strip()
