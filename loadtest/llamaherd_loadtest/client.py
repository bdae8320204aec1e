"""A streaming chat client that stamps each event when it arrives.

It stands on geventhttpclient, the library under Locust's FastHttpUser, but reads lines from the response itself:
`FastHttpSession.iter_lines` waits for 1024-byte blocks, which shows up as late first tokens.
"""

from __future__ import annotations

import errno
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import gevent
import msgspec
from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPConnectionClosed, HTTPParseError, HTTPSocketPoolResponse
from msgspec import Struct

from llamaherd_loadtest.samples import CLIENT, Sample
from llamaherd_loadtest.sse import END, Chunk, parse_line

clock = time.perf_counter
# A pool smaller than the load would queue requests in the client without a trace.
POOL = 65536
# What the kernel says when this machine, not the server, cannot open one more connection.
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM}
PATH = "/v1/chat/completions"


class Target(Struct, frozen=True, kw_only=True):
    """Where the load goes. `ca` is the only authority trusted, the system's where None; `timeout_s` is per request."""

    url: str
    model: str = ""
    key: str = ""
    ca: Path | None = None
    timeout_s: float = 600.0


class ChatClient:
    """Streams chat completions over kept-alive connections; one client serves all greenlets of a process."""

    def __init__(self, target: Target) -> None:
        """Raises ValueError for a URL or a CA file that cannot be used."""
        self._timeout_s = target.timeout_s
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if target.key:
            self._headers["Authorization"] = f"Bearer {target.key}"
        try:
            self._http = HTTPClient.from_url(
                target.url,
                concurrency=POOL,
                connection_timeout=min(10.0, target.timeout_s),
                # Requests have a deadline as a whole: one a read would double what an event costs.
                network_timeout=None,
                ssl_options={"ca_certs": str(target.ca)} if target.ca else {},
            )
        except (OSError, ssl.SSLError) as error:
            raise ValueError(f"cannot use CA file {target.ca}: {error}") from error

    def call(self, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """(status, body) of a GET of `path`, or of a POST where `body` is given. Raises OSError where there is none."""
        late = TimeoutError(f"no answer to {path} after {self._timeout_s:g} s")
        method = "POST" if body else "GET"
        try:
            with (
                gevent.Timeout(self._timeout_s, late),
                self._http.request(method, path, body=body or b"", headers=self._headers) as answer,
            ):
                return answer.status_code, answer.read()
        except HTTPParseError as error:
            raise OSError(str(error)) from error

    def close(self) -> None:
        """Close the idle connections."""
        self._http.close()

    def stream(self, body: bytes, sample: Sample, text: list[str] | None = None) -> None:
        """Send `body` and fill `sample` as the answer arrives; failures become its `outcome`, never exceptions.

        The answer's text is put into `text` where that is given.
        """
        sample.sent = clock()
        try:
            with gevent.Timeout(self._timeout_s), self._post(body) as response:
                _read(response, sample, text)
        except (gevent.Timeout, TimeoutError):
            sample.outcome, sample.detail = "timeout", f"no end after {self._timeout_s:g} s"
        except (msgspec.MsgspecError, HTTPParseError) as error:
            # geventhttpclient reports a peer that went away as a parse error too.
            gone = any(word in str(error) for word in ("closed", "Incomplete"))
            sample.outcome, sample.detail = "connection" if gone else "protocol", str(error)
        except OSError as error:
            sample.outcome = CLIENT if error.errno in _EXHAUSTED else "connection"
            sample.detail = str(error)
        sample.end = clock()

    def _post(self, body: bytes) -> HTTPSocketPoolResponse:
        try:
            return self._http.request("POST", PATH, body=body, headers=self._headers)
        except HTTPConnectionClosed:  # a kept-alive connection that the server closed just as we took it
            return self._http.request("POST", PATH, body=body, headers=self._headers)


def _read(response: HTTPSocketPoolResponse, sample: Sample, text: list[str] | None) -> None:
    if response.status_code != 200:
        sample.outcome, sample.detail = f"http {response.status_code}", _error_text(response.read())
        return
    finished, last = False, None
    for line in _lines(response):
        now = clock()
        chunk = parse_line(line)
        if chunk is None:
            continue
        if chunk is END:
            finished = True
        elif chunk.error is not None:
            sample.outcome, sample.detail = "stream_error", chunk.error_message
            return
        else:
            _note(chunk, now, sample)
            if text is not None:
                text.append(chunk.text)
            last = chunk if chunk.choices else last
    if not finished and not (last and last.finished):
        sample.outcome, sample.detail = "truncated", "the stream ended without a finish reason"
    elif sample.first is None:
        sample.outcome, sample.detail = "empty", "the answer had no text"


def _lines(response: HTTPSocketPoolResponse) -> Iterator[bytes]:
    """The stream's lines, an event's together when its blank line has arrived: half the calls of reading one by one."""
    first = response.readline(b"\n")
    yield first
    end = b"\r\n\r\n" if first.endswith(b"\r\n") else b"\n\n"
    while event := response.readline(end):
        yield from event.splitlines()
    yield from response.read().splitlines()  # what a stream that was cut short leaves


def _note(chunk: Chunk, now: float, sample: Sample) -> None:
    if chunk.has_text:
        if sample.last is None:
            sample.first = now
        else:
            sample.gaps.append(now - sample.last)
        sample.last = now
    if chunk.usage is not None:
        sample.prompt_tokens = chunk.usage.prompt_tokens
        sample.completion_tokens = chunk.usage.completion_tokens
        if chunk.usage.prompt_tokens_details is not None:
            sample.cached_tokens = chunk.usage.prompt_tokens_details.cached_tokens
    if chunk.timings is not None and chunk.timings.prompt_ms is not None:
        sample.prefill = chunk.timings.prompt_ms / 1000


def _error_text(body: bytes) -> str:
    try:
        return msgspec.json.decode(body, type=Chunk).error_message
    except msgspec.MsgspecError:
        return body[:200].decode("utf-8", "replace").strip()
