"""Child processes of engines: signals, exit status and log, and the message socket of a worker."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from llamaherd_server.wire.protocol import FromWorker
from llamaherd_server.worker.channel import LENGTH_BYTES

PROGRAM: tuple[str, ...] = ("-m", "llamaherd_server.worker")  # what Python runs as the worker
KEPT_LINES, LAST_CHARS = 20, 500
LINE_BYTES = 2**15  # longer lines are split
LOG_S = 5.0  # a child process of the engine may keep the pipe open: do not wait for it any longer
GRACE_S = 5.0
_decoder: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


class ChildProcess:
    """Base class. Subclasses start `_process`, with standard error as a pipe, and the task `_log`."""

    _process: asyncio.subprocess.Process
    _log: asyncio.Task[None]

    def __init__(self) -> None:
        self._last_lines: deque[str] = deque(maxlen=KEPT_LINES)

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    async def ended(self) -> str:
        """Wait for the process to end; return how it ended and the last line of its log, if any."""
        code = await self._process.wait()
        await asyncio.wait((self._log,), timeout=LOG_S)
        self._log.cancel()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        last = f": {self._last_lines[-1]}" if self._last_lines else ""
        return f"the engine ended with {how}{last}"

    async def end(self) -> None:
        """Terminate the process, and kill it after GRACE_S."""
        self._ask_to_end()
        try:
            async with asyncio.timeout(GRACE_S):
                await self._process.wait()
        except TimeoutError:
            self.kill()
        await self.ended()

    def _ask_to_end(self) -> None:
        self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:  # otherwise the pid may belong to another process
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def _pass_on_log(self) -> None:
        await self._read(self._process.stderr, self._pass_on)

    async def _read(self, pipe: asyncio.StreamReader | None, handle: Callable[[bytes], None]) -> None:
        """Call `handle` for each line until the pipe closes: a full pipe would block the engine during a request."""
        assert pipe is not None  # noqa: S101 (the process was started with a pipe)
        rest = b""
        while part := await pipe.read(LINE_BYTES):
            *lines, rest = (rest + part).split(b"\n")
            if len(rest) > LINE_BYTES:
                lines, rest = [*lines, rest], b""
            for line in lines:
                handle(line)
        handle(rest)

    def _pass_on(self, line: bytes) -> None:
        if text := line.decode(errors="replace").rstrip():
            self._last_lines.append(text[:LAST_CHARS])
            with contextlib.suppress(OSError):  # the disk may be full
                sys.stderr.write(f"{text}\n")


class WorkerProcess(ChildProcess):
    """Call `start`, then `receive` until it returns None, then `ended` for the reason."""

    def __init__(self, inherited: Sequence[int] = ()) -> None:
        """`inherited`: file descriptors that the worker inherits under the same numbers."""
        super().__init__()
        self._inherited = inherited

    async def start(self, config: bytes) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, *PROGRAM, str(theirs.fileno()), config.decode()),
                pass_fds=[theirs.fileno(), *self._inherited],
                stdin=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
            )
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        self._log = asyncio.create_task(self._pass_on_log())

    def send(self, frame: bytes) -> None:
        """Send a length-prefixed message."""
        self._writer.write(frame)

    async def receive(self, timeout_s: float | None) -> FromWorker | None:
        """Return the next message, or None after the last one; raises TimeoutError."""
        try:
            async with asyncio.timeout(timeout_s):
                size = int.from_bytes(await self._reader.readexactly(LENGTH_BYTES), "big")
                message = _decoder.decode(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return message

    async def ended(self) -> str:
        """Wait for the process to end; return how it ended and the last line of its log, if any."""
        how = await super().ended()
        self._writer.close()
        return how

    def _ask_to_end(self) -> None:
        """Close the socket; the worker ends after its current step."""
        self._writer.close()
