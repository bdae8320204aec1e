"""Keeps a worker running: starts it, kills it if it is wedged, and starts another one after it has ended."""

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
MAX_BACKOFF_S = 60.0
# After this many failures in a row, requests are refused instead of waiting for the next worker.
REFUSE_AFTER_FAILURES = 3
_MIN_WAIT_S = 0.1
# A worker that has been ready for longer than this resets the count of failures in a row.
STABLE_AFTER_S = 60.0


class Listener(Protocol):
    """Receives events about the workers."""

    def on_ready(self, ready: Ready) -> None:
        """Called when a worker is ready, the first one or a replacement."""

    def on_message(self, message: FromWorker) -> None:
        """Called with any other message of a worker."""

    def on_gone(self) -> None:
        """Called when a worker has ended; the supervisor's state says whether another one will start."""


class Process(Protocol):
    """What a supervisor needs from an engine's process; documented at engine.process.WorkerProcess."""

    @property
    def pid(self) -> int: ...

    async def start(self, config: bytes) -> None: ...

    def send(self, frame: bytes) -> None: ...

    async def receive(self, timeout_s: float | None) -> FromWorker | None: ...

    def kill(self) -> None: ...

    async def ended(self) -> str: ...

    async def end(self) -> None: ...


class Supervisor:
    """Calls `config` for the worker's configuration before each start.

    A ready worker sends a message every second and after every step. It is killed if its compute thread is silent for
    `heartbeat_timeout_s`, or if it is not ready after `load_timeout_s`. If the first worker ends before it is ready,
    none follows. Afterwards every worker that ends is replaced after a back-off, however many fail.
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
        self._beat = time.monotonic()  # time of the compute thread's last message
        self._first_outcome = asyncio.Event()  # set once the first worker is ready or has failed

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def refusal(self) -> str | None:
        """Why no worker is available now or soon; None if requests may wait for one."""
        gone = self.state in ("failed", "stopped")
        if gone or (self.state == "restarting" and self._failures >= REFUSE_AFTER_FAILURES):
            return self.last_error or f"the engine is {self.state}"
        return None

    @property
    def heartbeat_age_s(self) -> float:
        return time.monotonic() - self._beat if self._process else 0.0

    async def start(self) -> None:
        """Start, and return when the first worker is ready or has failed; `state` says which."""
        self._task = asyncio.create_task(self._run())
        outcome = asyncio.create_task(self._first_outcome.wait())
        await asyncio.wait((self._task, outcome), return_when=asyncio.FIRST_COMPLETED)
        outcome.cancel()
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
        """Send a frame to the ready worker; without one, drop it."""
        if self._process and self.state == "ready":
            self._process.send(frame)

    async def _run(self) -> None:
        """Run one worker after another; stop if the first one does not start."""
        while self.state != "failed":
            try:
                ready_s = await self._run_one()
            except Exception as error:  # the process could not start, for lack of memory or file descriptors
                self.last_error, ready_s = f"the engine's process could not be run: {error!r}", 0.0
                if self._process:
                    self._process.kill()
            self._failures = 1 if ready_s > STABLE_AFTER_S else self._failures + 1
            if self._first_outcome.is_set():
                self.state = "restarting"
                self.restarts += 1
            else:
                self.state = "failed"
            self._listener.on_gone()
            if self.state == "restarting":
                log.warning("engine ended", error=self.last_error, failures=self._failures)
                await asyncio.sleep(min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** min(self._failures - 1, 16)))
        self._first_outcome.set()

    def _receive_timeout_s(self, until: float | None) -> float:
        """Return how long to wait for the next message: up to `until`, or up to the heartbeat timeout if None."""
        return max(_MIN_WAIT_S, (until or self._beat + self._heartbeat_timeout_s) - time.monotonic())

    async def _run_one(self) -> float:
        """Run one worker until it ends; return for how many seconds it was ready."""
        process = self._new_process()
        load_until = time.monotonic() + self._load_timeout_s
        await process.start(self._config())
        self._process, self._beat = process, time.monotonic()
        refusal = silence = ready_at = None
        try:
            while message := await process.receive(self._receive_timeout_s(load_until if ready_at is None else None)):
                if not isinstance(message, Tokens | Text | Failed):  # these come from other threads of the worker
                    self._beat = time.monotonic()
                if isinstance(message, Ready):
                    ready_at = time.monotonic()
                    self.state = "ready"
                    self._first_outcome.set()
                    self._listener.on_ready(message)
                elif isinstance(message, Failed) and message.id == 0:
                    refusal = message.message
                elif not isinstance(message, Loading):
                    self._listener.on_message(message)
        except TimeoutError:
            silence = (
                f"the engine was not ready after {self._load_timeout_s:g} s (limits.load_timeout_s) and was killed"
                if ready_at is None
                else f"the engine sent no heartbeat for {self._heartbeat_timeout_s:g} s and was killed"
            )
            process.kill()
        end = await process.ended()
        self.last_error = refusal or silence or end
        return 0.0 if ready_at is None else time.monotonic() - ready_at
