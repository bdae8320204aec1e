"""Runs functions that are slow or handle untrusted input, such as chat templates, in expendable child processes.

Several processes run in parallel, so that a call that uses up its time does not delay the others, and a single caller
cannot occupy all of them. A call that kills its process fails; if a process is killed or stopped from outside (SIGKILL,
SIGSTOP), its call is retried.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Self, TypeVar, get_type_hints

import msgspec

from llamaherd_server.errors import ApiError
from llamaherd_server.process.priority import SLOW_S, Patience
from llamaherd_server.process.turns import Turns
from llamaherd_server.sandbox.child import Call, Refused

A = TypeVar("A")
R = TypeVar("R")

CPU_S = 2.0
# Wall-clock limit of a call as a multiple of its CPU time, for busy hosts. Stopped processes are detected sooner.
_WALL_PER_CPU = 15
_SLOW_SHARE = 0.15  # of its CPU time: a call that used this much is slow itself, even on a busy host
_OVERLOADED_S = 15.0  # a call that used less may take at least this long, because the host is slow
_MAX_PROCESSES = 8
_LEFT_FOR_OTHERS = 2
_MAX_IDLE = 2
# How long a call waits for a busy process, unless all calls are slow: starting one costs more than most calls.
_WAIT_FOR_IDLE_S = 1.0
_MAX_ATTEMPTS = 3
_MAX_ANSWER_BYTES = 64 * 2**20
# Exit codes of a process that was killed from outside.
_KILLED_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)


class SandboxError(Exception):
    """The call failed or exceeded its limits; the message is for the client."""


class Slow(SandboxError):
    """The call exceeded its wall-clock limit after using _SLOW_SHARE of its CPU time, but not all of it."""


class _Lost(Exception):
    """The process was killed or stopped from outside, not by its call."""


class Sandbox:
    """Supervised child processes, started on demand.

    They import `modules` at their start, so that imports neither slow down the first call nor use up its CPU time.
    """

    def __init__(self, most: int = _MAX_PROCESSES, modules: Sequence[str] = ()) -> None:
        self._modules = modules
        self._idle: asyncio.LifoQueue[_Child] = asyncio.LifoQueue()
        self._children: set[_Child] = set()
        self._turns = Turns(most, _LEFT_FOR_OTHERS)
        self._stopped = False

    async def start(self) -> None:
        """Start a process ahead of the first call."""
        self._idle.put_nowait(await self._new())

    async def stop(self) -> None:
        """Kill the processes; calls that are still running fail."""
        self._stopped = True
        await asyncio.gather(*(child.kill() for child in self._children))

    async def in_child(
        self, function: Callable[[A], R], argument: A, cpu_s: float = CPU_S, patience: float = _WALL_PER_CPU
    ) -> R:
        """Return `function(argument)`, computed in a child process.

        `cpu_s` limits the CPU time in seconds, `cpu_s * patience` the wall time. `function` must be a module-level
        function of this package; argument and return value are sent as JSON of their annotated types. Re-raises its
        ApiError. Raises SandboxError for other exceptions and exceeded limits (Slow if a retry may succeed), and
        ApiError (503) if its processes are killed from outside _MAX_ATTEMPTS times or the host is overloaded.
        """
        call = Call(f"{function.__module__}:{function.__name__}", cpu_s, msgspec.Raw(msgspec.json.encode(argument)))
        body = msgspec.json.encode(call)
        for _ in range(_MAX_ATTEMPTS):
            async with self._child() as child:
                try:
                    answer = await child.answer(body, cpu_s, cpu_s * patience)
                except _Lost:
                    continue
            kind, content = answer[:1], answer[1:]
            if kind == b"+":
                value: R = msgspec.json.decode(content, type=get_type_hints(function)["return"])
                return value
            if kind == b"-":
                refused = msgspec.json.decode(content, type=Refused)
                raise ApiError(refused.status, refused.message, code=refused.code, param=refused.param)
            raise SandboxError(content.decode())
        raise ApiError(503, "the process for this request was killed from outside", code="sandbox_lost", retry_after=1)

    @asynccontextmanager
    async def _child(self) -> AsyncIterator[_Child]:
        """Wait for the caller's turn, and yield a child for one call."""
        async with self._turns.place():
            child = await self._wait_for_idle() or await self._new()
            try:
                yield child
            finally:
                if child.usable and not self._stopped and self._idle.qsize() < _MAX_IDLE:
                    self._idle.put_nowait(child)
                else:
                    await child.kill()
                    self._children.discard(child)

    async def _wait_for_idle(self) -> _Child | None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_WAIT_FOR_IDLE_S):
                while any(child.quick for child in self._children):
                    with suppress(TimeoutError):
                        async with asyncio.timeout(SLOW_S):
                            return await self._idle.get()
        return None

    async def _new(self) -> _Child:
        self._refuse_if_stopped()
        try:
            child = await _Child.start(self._modules)
        except (OSError, EOFError):
            raise ApiError(
                503, "no process for this request could be started", code="sandbox_lost", retry_after=1
            ) from None
        self._children.add(child)
        if self._stopped:  # during the start of the child
            await child.kill()
        self._refuse_if_stopped()
        return child

    def _refuse_if_stopped(self) -> None:
        if self._stopped:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=1)


class _Child:
    """One child process. `usable` is true if it can take another call."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self.usable = True
        self._patience = Patience(process.pid)

    @property
    def quick(self) -> bool:
        """Whether its call, if any, has not proved slow yet."""
        return not self._patience.lowered

    @classmethod
    async def start(cls, modules: Sequence[str]) -> Self:
        ours, theirs = socket.socketpair()
        command = (sys.executable, "-I", "-m", "llamaherd_server.sandbox.child", *modules)
        with theirs:
            end = theirs.fileno()
            try:
                process = await asyncio.create_subprocess_exec(*command, stdin=end, stdout=end, env={})
            except BaseException:
                ours.close()
                raise
        child = cls(process, *await asyncio.open_connection(sock=ours))
        try:
            await child._read()
        except BaseException:
            await child.kill()
            raise
        return child

    async def answer(self, body: bytes, cpu_s: float, wait_s: float) -> bytes:
        """Return its answer to a call; raises SandboxError, _Lost and ApiError (503)."""
        self.usable = False  # an answer that was not read here would be taken for the next call's
        self._patience.again()
        asked = asyncio.create_task(self._ask(body))
        began = time.monotonic()
        try:
            while not (await asyncio.wait((asked,), timeout=SLOW_S))[0]:
                self._patience.look()
                if self._is_stopped():
                    raise _Lost
                used_s, waited_s = self._patience.used_s, time.monotonic() - began
                if waited_s > wait_s and used_s > _SLOW_SHARE * cpu_s:
                    raise Slow(f"takes more than {used_s:.2g} s of CPU time, on a busy host")
                if waited_s > max(wait_s, _OVERLOADED_S):
                    message = f"less than {cpu_s:g} s of CPU time available in {waited_s:.0f} s: the host is overloaded"
                    raise ApiError(503, message, code="sandbox_lost", retry_after=1)
            answer = asked.result()
        except (EOFError, ConnectionError):
            code = await self._process.wait()
            if code in _KILLED_FROM_OUTSIDE:
                raise _Lost from None
            exceeded = f"time: {cpu_s:g} s of CPU time" if code == -signal.SIGPROF else "time and memory"
            raise SandboxError(f"exceeded its limits of {exceeded}") from None
        finally:
            asked.cancel()
        self.usable = self.quick
        return answer

    async def kill(self) -> None:
        self.usable = False
        with suppress(ProcessLookupError):
            self._process.kill()
        self._writer.close()
        await self._process.wait()

    async def _ask(self, body: bytes) -> bytes:
        self._writer.write(len(body).to_bytes(4, "big") + body)
        await self._writer.drain()
        return await self._read()

    def _is_stopped(self) -> bool:
        """Whether a signal has stopped the process; always false without /proc."""
        with suppress(OSError):
            state = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            return state in {"T", "t"}
        return False

    async def _read(self) -> bytes:
        size = int.from_bytes(await self._reader.readexactly(4), "big")
        if size > _MAX_ANSWER_BYTES:
            raise EOFError
        return await self._reader.readexactly(size)
