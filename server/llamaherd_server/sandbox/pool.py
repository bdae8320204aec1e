"""Runs functions on untrusted input in processes that may die: chat templates, grammars, whatever may take long.

There are a few such processes, so that a call that burns its budget delays no other one; of them, one caller may keep
all but a few busy. What a call does to its process, it pays for; what others do to it (a SIGKILL, a SIGSTOP) costs a
second try.
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
# On a busy host a slow call may take so many times its CPU time; a process that was stopped is noticed sooner.
_PATIENCE = 15
_SLOW_SHARE = 0.15  # of its CPU time: who has had that much is slow, whatever the host
_OVERLOADED_S = 15.0  # who has had less is waited for longer: the host is slow
_MOST = 8
_LEFT_FOR_OTHERS = 2
_KEPT = 2
# A call waits for a process that has other work, unless that is slow: starting one costs more than most calls.
_SOON_S = 1.0
_TRIES = 3
_LARGEST_ANSWER = 64 * 2**20
# How a process ends that somebody else ended.
_ENDED_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)


class SandboxError(Exception):
    """The call failed or went over its limits; the message is for the client."""


class Slow(SandboxError):
    """The call had a good part of its CPU time, and not all of it while the caller waited."""


class _Lost(Exception):
    """The process ended, and not by what it was given."""


class Sandbox:
    """Supervised child processes, started when they are needed.

    They import `modules` first: a call is not slow, nor is its CPU time used up, for what the first one has to import.
    """

    def __init__(self, most: int = _MOST, modules: Sequence[str] = ()) -> None:
        self._modules = modules
        self._idle: asyncio.LifoQueue[_Child] = asyncio.LifoQueue()
        self._children: set[_Child] = set()
        self._turns = Turns(most, _LEFT_FOR_OTHERS)
        self._stopped = False

    async def start(self) -> None:
        """Start a process ahead of the first call."""
        self._idle.put_nowait(await self._new())

    async def stop(self) -> None:
        """End the processes, and with them the calls that still run."""
        self._stopped = True
        await asyncio.gather(*(child.kill() for child in self._children))

    async def in_child(
        self, function: Callable[[A], R], argument: A, cpu_s: float = CPU_S, patience: float = _PATIENCE
    ) -> R:
        """`function(argument)`, computed in a child within `cpu_s` seconds of CPU time, and `patience` times as many.

        `function` is one of this package, by name; argument and value go as JSON of the types that it is annotated
        with. Raises the ApiError that it raises, SandboxError for any other exception and for exceeded limits (Slow
        where another time may do), and ApiError (503) when its processes are ended from outside again and again, or
        the host has no time for them.
        """
        call = Call(f"{function.__module__}:{function.__name__}", cpu_s, msgspec.Raw(msgspec.json.encode(argument)))
        body = msgspec.json.encode(call)
        for _ in range(_TRIES):
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
        raise ApiError(503, "the process for this request was ended from outside", code="sandbox_lost", retry_after=1)

    @asynccontextmanager
    async def _child(self) -> AsyncIterator[_Child]:
        """A child for one call, once there is one for this caller."""
        async with self._turns.one():
            child = await self._soon_idle() or await self._new()
            try:
                yield child
            finally:
                if child.usable and not self._stopped and self._idle.qsize() < _KEPT:
                    self._idle.put_nowait(child)
                else:
                    await child.kill()
                    self._children.discard(child)

    async def _soon_idle(self) -> _Child | None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_SOON_S):
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
        if self._stopped:  # in the meantime
            await child.kill()
        self._refuse_if_stopped()
        return child

    def _refuse_if_stopped(self) -> None:
        if self._stopped:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=1)


class _Child:
    """One process. `usable`: between two calls."""

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
        """Whether its call, if it has one, may end soon."""
        return not self._patience.lost

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
        """Its answer to a call; raises SandboxError, and _Lost."""
        self.usable = False  # until the answer has been read, or the next call would read it
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
                    message = f"no {cpu_s:g} s of CPU time in {waited_s:.0f} s: the host is overloaded"
                    raise ApiError(503, message, code="sandbox_lost", retry_after=1)
            answer = asked.result()
        except (EOFError, ConnectionError):
            code = await self._process.wait()
            if code in _ENDED_FROM_OUTSIDE:
                raise _Lost from None
            exceeded = f"time: {cpu_s:g} s of CPU time" if code == -signal.SIGPROF else "time and memory"
            raise SandboxError(f"went over its limits of {exceeded}") from None
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
        """Whether a signal has stopped it; where there is no /proc that cannot be seen."""
        with suppress(OSError):
            state = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            return state in {"T", "t"}
        return False

    async def _read(self) -> bytes:
        size = int.from_bytes(await self._reader.readexactly(4), "big")
        if size > _LARGEST_ANSWER:
            raise EOFError
        return await self._reader.readexactly(size)
