"""An HTTP answer that the event loop reads by itself: a piece is stamped when it arrives and parsed later.

Its greenlet sleeps until the end: to wake it for each event would cost as much as all else that an event needs.
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
_BLOCK = 16384  # as much as a TLS record holds: no rest stays in the TLS library, where the loop does not see it
# Pieces that may wait: few, so that parsing them holds up nobody, and not the same number for each answer,
# since servers send the tokens of all their slots at once.
_batches = itertools.cycle(range(8, 16))

Pieces = list[tuple[float, bytearray]]


class Answer(HTTPResponse):
    """The answer on `sock`. `take` gets the body of a 200: its pieces, each with its arrival, many at a time."""

    def __init__(self, sock: gevent.socket.socket, take: Callable[[Pieces], None] | None = None) -> None:
        super().__init__("POST")
        self._sock, self._take, self._loop = sock, take, gevent.get_hub().loop
        self._arrivals: list[float] = []  # of what was received and not parsed yet
        self._received: list[bytes] = []
        self._pieces: Pieces = []
        self._arrival = 0.0
        self._may_wait, self._batch = False, next(_batches)
        self._ended, self._failure = Event(), list[Exception]()

    def wait(self) -> None:
        """Sleep until the answer is there. Raises OSError, HTTPParseError, and what `take` raises.

        HTTPConnectionClosed where the connection ended before the answer began.
        """
        self._watcher = self._loop.io(self._sock.fileno(), _READABLE)
        self._watcher.start(self._read)
        self._sock.settimeout(0.0)
        try:
            self._ended.wait()
        except BaseException:
            self._parse()  # what came until then counts
            raise
        finally:
            self._watcher.close()
        for failure in self._failure:
            raise failure

    def body(self) -> bytes:
        """What `take` did not get."""
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
        # A chunked body ends with an empty line: what does not end so is not its end. Errors are told at once.
        ends = len(data) < 4 or data.endswith(b"\r\n\r\n")
        if ends or not self._may_wait or len(self._received) >= self._batch or b"error" in data:
            self._loop.run_callback(self._parse)  # when all that has arrived is stamped

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
        except Exception as failure:  # this runs in the loop, it belongs to the greenlet
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
        if self.status_code >= 200:  # not an interim answer
            self._end()
