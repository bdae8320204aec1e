"""The worker's end of the socket: whole messages in, whole messages out."""

from __future__ import annotations

import select
import socket

import msgspec

from llamaherd_server.protocol import FromWorker, ToWorker

LENGTH_BYTES = 4


class Closed(Exception):
    """The front end has gone."""


class Channel:
    """Length-prefixed msgpack on a stream socket. Sending blocks, receiving waits only as long as asked."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
        self._buffer = bytearray()

    def send(self, message: FromWorker) -> None:
        body = self._encoder.encode(message)
        try:
            self._socket.sendall(len(body).to_bytes(LENGTH_BYTES, "big") + body)
        except OSError as error:
            raise Closed from error

    def receive(self, timeout_s: float) -> list[ToWorker]:
        """What has arrived, after waiting at most `timeout_s` seconds for something; raises Closed."""
        while select.select([self._socket], [], [], timeout_s)[0]:
            data = self._socket.recv(1 << 18)
            if not data:
                raise Closed
            self._buffer += data
            timeout_s = 0
        return list(self._messages())

    def _messages(self) -> list[ToWorker]:
        messages = []
        start = 0
        while len(self._buffer) - start >= LENGTH_BYTES:
            end = start + LENGTH_BYTES + int.from_bytes(self._buffer[start : start + LENGTH_BYTES], "big")
            if len(self._buffer) < end:
                break
            messages.append(self._decoder.decode(memoryview(self._buffer)[start + LENGTH_BYTES : end].tobytes()))
            start = end
        del self._buffer[:start]
        return messages
