"""An HTTP response that the event loop reads itself. Chunks are timestamped on arrival and parsed later, in batches.

The requesting greenlet sleeps until the end: waking it for each event would double the client's cost per event.
"""

from __future__ import annotations

import itertools
import ssl
from collections.abc import Callable
from time import perf_counter

import gevent
import gevent.socket
from gevent.event import Event
from geventhttpclient.response import HTTPConnectionClosed, HTTPResponse

_READABLE = 1
_BLOCK = 16384  # the size of a TLS record: nothing stays in the TLS library's buffer, which the loop does not see
# How many chunks may wait before they are parsed: few, so that parsing delays no other response, and a different number
# for each response, because servers send the tokens of all their slots at once.
_batches = itertools.cycle(range(8, 16))

Pieces = list[tuple[float, bytearray]]


class Answer(HTTPResponse):
    """The response on `sock`. `take` receives the body of a 200 as chunks with arrival times, several at a time."""

    def __init__(self, sock: gevent.socket.socket, take: Callable[[Pieces], None] | None = None) -> None:
        super().__init__("POST")
        self._sock, self._take, self._loop = sock, take, gevent.get_hub().loop
        self._arrivals: list[float] = []  # for chunks received but not parsed yet
        self._received: list[bytes] = []
        self._pieces: Pieces = []
        self._arrival = 0.0
        self._may_wait, self._batch = False, next(_batches)
        self._ended, self._failure = Event(), list[Exception]()

    def wait(self) -> None:
        """Sleep until the response is complete. Raises OSError, HTTPParseError, and whatever `take` raises.

        Raises HTTPConnectionClosed if the connection ended before the response began.
        """
        self._watcher = self._loop.io(self._sock.fileno(), _READABLE)
        self._watcher.start(self._read)
        self._sock.settimeout(0.0)
        try:
            self._ended.wait()
        except BaseException:
            self._parse()  # keep what arrived before the interruption
            raise
        finally:
            self._watcher.close()
        for failure in self._failure:
            raise failure

    def body(self) -> bytes:
        """Return the part of the body that `take` did not receive."""
        return b"".join(piece for _, piece in self._pieces)

    def _read(self) -> None:
        try:
            data = self._sock.recv(_BLOCK)
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except OSError as failure:
            self._parse()
            self._end(failure if self.message_begun else HTTPConnectionClosed("connection closed."))
            return
        self._arrivals.append(perf_counter())
        self._received.append(data)
        # Only an empty line can end a chunked body. Errors are parsed without delay.
        ends = len(data) < 4 or data.endswith(b"\r\n\r\n")
        if ends or not self._may_wait or len(self._received) >= self._batch or b"error" in data:
            self._loop.run_callback(self._parse)  # after everything that has arrived is timestamped

    def _parse(self) -> None:
        arrivals, received, self._arrivals, self._received = self._arrivals, self._received, [], []
        try:
            for self._arrival, data in zip(arrivals, received, strict=True):
                if not data and not self.message_begun:
                    raise HTTPConnectionClosed("connection closed.")
                self.feed(data)
            if self._take is not None and self.status_code == 200:
                pieces, self._pieces = self._pieces, []
                self._take(pieces)
        except Exception as failure:  # this runs in the event loop; the greenlet raises it
            self._end(failure)

    def _end(self, *failure: Exception) -> None:
        self._failure += failure
        self._watcher.stop()
        self._ended.set()

    def _on_headers_complete(self) -> int | bool | None:
        skips_body = super()._on_headers_complete()
        self._may_wait = self.status_code == 200 and self.get("transfer-encoding") == "chunked"
        return skips_body

    def _on_body(self, buf: bytearray) -> None:
        self._pieces.append((self._arrival, buf))

    def _on_message_complete(self) -> None:
        super()._on_message_complete()
        if self.status_code >= 200:  # not a 1xx response
            self._end()
