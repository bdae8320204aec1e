"""Keeps one worker running: starts it, kills it when it is wedged, starts the next one when it has gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

import structlog

from llamaherd_server.engine.base import EngineState
from llamaherd_server.engine.process import WorkerProcess
from llamaherd_server.wire.protocol import Failed, FromWorker, Loading, Ready, Text, Tokens

log = structlog.get_logger()

FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 60.0
# From so many failures in a row on, requests are refused until there is a worker, rather than kept waiting for one.
REFUSED_FROM_FAILURES = 3
_LEAST_WAIT_S = 0.1
# A worker that has been ready for this long has put the failures before it behind.
SETTLED_S = 60.0


class Listener(Protocol):
    """Who is told of the workers."""

    def on_ready(self, ready: Ready) -> None:
        """A worker, the first or the next, takes requests."""

    def on_message(self, message: FromWorker) -> None:
        """Whatever else a worker says."""

    def on_gone(self) -> None:
        """A worker has gone. The supervisor's state says whether another one will come."""


class Process(Protocol):
    """What a supervisor needs of an engine's process; engine.process.WorkerProcess has the words for it."""

    @property
    def pid(self) -> int: ...

    async def start(self, config: bytes) -> None: ...

    def send(self, frame: bytes) -> None: ...

    async def receive(self, timeout_s: float | None) -> FromWorker | None: ...

    def kill(self) -> None: ...

    async def ended(self) -> str: ...

    async def end(self) -> None: ...


class Supervisor:
    """`config` is asked for the worker's configuration before each start.

    A worker that is ready speaks once a second, and after every step: one whose computing thread is silent for
    `heartbeat_timeout_s` is wedged, as is one that is not ready after `load_timeout_s`. A first one that never became
    ready is not started again. Once there was one, the next is started after a back-off, however many fail.
    """

    def __init__(
        self,
        config: Callable[[], bytes],
        listener: Listener,
        heartbeat_timeout_s: float,
        new_process: Callable[[], Process] = WorkerProcess,
        load_timeout_s: float = 900,
    ) -> None:
        self.state: EngineState = "loading"
        self.restarts = 0
        self.last_error: str | None = None
        self._config = config
        self._listener = listener
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._load_timeout_s = load_timeout_s
        self._new_process = new_process
        self._process: Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._failures = 0  # in a row
        self._beat = time.monotonic()  # when the thread that computes last spoke
        self._settled = asyncio.Event()  # the first worker is ready, or never will be

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def refusal(self) -> str | None:
        """Why there is no worker, nor will be soon."""
        gone = self.state in ("failed", "stopped")
        if gone or (self.state == "restarting" and self._failures >= REFUSED_FROM_FAILURES):
            return self.last_error or f"the engine is {self.state}"
        return None

    @property
    def heartbeat_age_s(self) -> float:
        return time.monotonic() - self._beat if self._process else 0.0

    async def start(self) -> None:
        """Return when the first worker is ready, or when there will be none: `state` tells which."""
        self._task = asyncio.create_task(self._run())
        settled = asyncio.create_task(self._settled.wait())
        await asyncio.wait((self._task, settled), return_when=asyncio.FIRST_COMPLETED)
        settled.cancel()
        if self._task.done():
            self._task.result()

    async def stop(self) -> None:
        self.state = "stopped"
        if self._task:
            self._task.cancel()
            await asyncio.wait((self._task,))
        if self._process:
            await self._process.end()

    def send(self, frame: bytes) -> None:
        """To the worker that is ready; otherwise to nobody."""
        if self._process and self.state == "ready":
            self._process.send(frame)

    async def _run(self) -> None:
        """One worker after the other, until the first one cannot start."""
        while self.state != "failed":
            try:
                lived_s = await self._run_one()
            except Exception as error:  # no process could be started, for want of memory or file descriptors
                self.last_error, lived_s = f"the engine's process could not be run: {error!r}", 0.0
                if self._process:
                    self._process.kill()
            self._failures = 1 if lived_s > SETTLED_S else self._failures + 1
            if self._settled.is_set():
                self.state = "restarting"
                self.restarts += 1
            else:
                self.state = "failed"
            self._listener.on_gone()
            if self.state == "restarting":
                log.warning("engine ended", error=self.last_error, failures=self._failures)
                await asyncio.sleep(min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** min(self._failures - 1, 16)))
        self._settled.set()

    def _patience_s(self, until: float | None) -> float:
        """How long to wait for the next message: until then, or until the heartbeat's timeout."""
        return max(_LEAST_WAIT_S, (until or self._beat + self._heartbeat_timeout_s) - time.monotonic())

    async def _run_one(self) -> float:
        """A worker's life; for how many seconds it was ready."""
        process = self._new_process()
        load_until = time.monotonic() + self._load_timeout_s
        await process.start(self._config())
        self._process, self._beat = process, time.monotonic()
        refusal = silence = ready_at = None
        try:
            while message := await process.receive(self._patience_s(load_until if ready_at is None else None)):
                if not isinstance(message, Tokens | Text | Failed):  # these come from the threads beside it
                    self._beat = time.monotonic()
                if isinstance(message, Ready):
                    ready_at = time.monotonic()
                    self.state = "ready"
                    self._settled.set()
                    self._listener.on_ready(message)
                elif isinstance(message, Failed) and message.id == 0:
                    refusal = message.message
                elif not isinstance(message, Loading):
                    self._listener.on_message(message)
        except TimeoutError:
            silence = (
                f"the engine was not ready after {self._load_timeout_s:g} s (limits.load_timeout_s) and was killed"
                if ready_at is None
                else f"the engine did not speak for {self._heartbeat_timeout_s:g} s and was killed"
            )
            process.kill()
        end = await process.ended()
        self.last_error = refusal or silence or end
        return 0.0 if ready_at is None else time.monotonic() - ready_at
