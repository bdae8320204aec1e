"""Renders chat templates, which are code that comes with a model file, in a process that may die.

One process serves all calls, one after the other: a typical template takes well under a millisecond.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from contextlib import suppress
from typing import Any

import msgspec


class SandboxError(Exception):
    """The call failed or went over its limits; the message is for the client."""


class Sandbox:
    """A supervised sandbox_child process, started when first needed and again after a call that killed it."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        """Start the process ahead of the first call."""
        async with self._lock:
            await self._running()

    async def stop(self) -> None:
        async with self._lock:
            await self._kill()

    async def render(self, template: str, context: dict[str, Any]) -> str:
        """The template's output for `context`; raises SandboxError."""
        async with self._lock:
            reader, writer = await self._running()
            body = msgspec.json.encode({"template": template, "context": context})
            try:
                writer.write(len(body).to_bytes(4, "big") + body)
                await writer.drain()
                size = int.from_bytes(await reader.readexactly(4), "big")
                answer = await reader.readexactly(size)
            except (asyncio.IncompleteReadError, ConnectionError):
                await self._kill()
                raise SandboxError("went over its limits of time and memory") from None
            except asyncio.CancelledError:
                await self._kill()  # or the next call would read this one's answer
                raise
        text = answer[1:].decode()
        if answer[:1] != b"+":
            raise SandboxError(text)
        return text

    async def _running(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._process is not None and self._streams is not None and self._process.returncode is None:
            return self._streams
        ours, theirs = socket.socketpair()
        command = (sys.executable, "-I", "-m", "llamaherd_server.chat.sandbox_child")
        with theirs:
            end = theirs.fileno()
            self._process = await asyncio.create_subprocess_exec(*command, stdin=end, stdout=end, env={})
        self._streams = reader, writer = await asyncio.open_connection(sock=ours)
        await reader.readexactly(1)  # it has imported what it needs
        return reader, writer

    async def _kill(self) -> None:
        if self._process is None or self._streams is None:
            return
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        self._streams[1].close()
        self._process = self._streams = None
