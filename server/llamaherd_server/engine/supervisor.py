"""A worker process and its socket: started, watched by its heartbeat, ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable

import msgspec

from llamaherd_server.protocol import FromWorker, ToWorker

LENGTH_BYTES = 4
KEPT_LINES = 20


class Worker:
    """One worker process; `on_message` gets what it says, `on_exit` runs once when it has gone."""

    def __init__(self, on_message: Callable[[FromWorker], None], on_exit: Callable[[str], None]) -> None:
        self._on_message = on_message
        self._on_exit = on_exit
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
        self._last_lines: deque[str] = deque(maxlen=KEPT_LINES)
        self.heard = time.monotonic()
        self.pid = 0

    async def start(self, config: bytes) -> None:
        ours, theirs = socket.socketpair()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "llamaherd_server.worker", str(theirs.fileno()), config.decode()),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
            )
        finally:
            theirs.close()
        self.pid = self._process.pid
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        log = self._process.stderr
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._keep(log))] if log else []

    def send(self, message: ToWorker) -> None:
        body = self._encoder.encode(message)
        self._writer.write(len(body).to_bytes(LENGTH_BYTES, "big") + body)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    async def end(self) -> None:
        """Close the socket, which ends the worker; kill it when that does not."""
        self._writer.close()
        try:
            async with asyncio.timeout(5):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _read(self) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                size = int.from_bytes(await self._reader.readexactly(LENGTH_BYTES), "big")
                message = self._decoder.decode(await self._reader.readexactly(size))
                self.heard = time.monotonic()
                self._on_message(message)
        code = await self._process.wait()
        await self._tasks[1]
        self._writer.close()
        words = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        last = f": {self._last_lines[-1]}" if self._last_lines else ""
        self._on_exit(f"the engine ended with {words}{last}")

    async def _keep(self, log: asyncio.StreamReader) -> None:
        async for line in log:
            text = line.decode(errors="replace").rstrip()
            self._last_lines.append(text)
            sys.stderr.write(text + "\n")
