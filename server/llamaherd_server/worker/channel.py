"""Length-prefixed msgpack messages over a stream socket: the worker's end, and the framing for both ends."""

from __future__ import annotations

import select
import socket
import threading
from typing import Any

import msgspec

from llamaherd_server.wire.protocol import FromWorker, ToWorker

LENGTH_BYTES = 4
RECEIVE_BYTES = 1 << 18
_encoder = msgspec.msgpack.Encoder()


class Closed(Exception):
    """The front end has closed the connection."""


def frame(message: Any) -> bytes:
    body = _encoder.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


class Channel:
    """Any thread may `send`, which blocks while the socket is full; one thread may `receive`. Both raise Closed."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._sending = threading.Lock()
        self._decoder: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
        self._buffer = bytearray()

    def send(self, message: FromWorker) -> None:
        try:
            with self._sending:
                self._socket.sendall(frame(message))
        except OSError as error:
            raise Closed from error

    def receive(self, timeout_s: float | None = None) -> list[ToWorker]:
        """Wait for data, at most `timeout_s` seconds if given, and return the complete messages received."""
        if not select.select([self._socket], [], [], timeout_s)[0]:
            return []
        try:
            data = self._socket.recv(RECEIVE_BYTES)
        except OSError as error:
            raise Closed from error
        if not data:
            raise Closed
        self._buffer += data
        return self._messages()

    def _messages(self) -> list[ToWorker]:
        messages, start = [], 0
        while len(self._buffer) - start >= LENGTH_BYTES:
            end = start + LENGTH_BYTES + int.from_bytes(self._buffer[start : start + LENGTH_BYTES], "big")
            if len(self._buffer) < end:
                break
            messages.append(self._decoder.decode(bytes(self._buffer[start + LENGTH_BYTES : end])))
            start = end
        del self._buffer[:start]
        return messages
