"""The server's lifecycle: readiness, the systemd watchdog, reload on SIGHUP, drain on SIGTERM, and exit if an engine
fails.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import structlog

from llamaherd_server.config.keys import KeyStore
from llamaherd_server.config.settings import LimitSettings
from llamaherd_server.engine.base import EngineState
from llamaherd_server.errors import ApiError
from llamaherd_server.process.sdnotify import Notifier
from llamaherd_server.serving.generation import Serving
from llamaherd_server.serving.metrics import Totals
from llamaherd_server.wire.errors import EngineError

log = structlog.get_logger()

_TICK_S = 1.0
# systemd must not limit the load time: while the event loop runs, each tick requests this much more time.
_START_EXTENSION_S = 30
_RETRY_AFTER_S = 5
_INTAKE_S = 5.0  # an engine with a probe unanswered for this long is not ready
# How long streams get to send their last error event after their engine was stopped.
_FLUSH_S = 5.0


class Lifecycle:
    """Starts, watches and stops the engines. Calls `over` when the process should exit with `exit_code`."""

    def __init__(self, servings: list[Serving], limits: LimitSettings, totals: Totals, keys: KeyStore | None) -> None:
        self.exit_code = 0
        self.over: Callable[[], None] = lambda: None
        self._servings = servings
        self._engines = [serving.engine for serving in servings]
        self._limits = limits
        self._totals = totals
        self._keys = keys
        self._last_report = (time.monotonic(), 0)  # time and token count of the last status report
        self.tokens_per_s = 0.0  # between the last two status reports
        self._notifier = Notifier()
        self.draining = False
        self._started = False
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._drain_task: asyncio.Task[None] | None = None

    def alive(self) -> bool:
        """Whether the step loops of all ready engines are running; loading and restarting ones have none."""
        statuses = [engine.status() for engine in self._engines]
        return all(
            status.state != "ready" or status.heartbeat_age_s < self._limits.heartbeat_timeout_s for status in statuses
        )

    def ready(self) -> bool:
        """Whether every engine would accept a request now; models on demand always do and are not checked."""
        statuses = [engine.status() for engine in self._engines if not engine.on_demand]
        return (
            self._started
            and not self.draining
            and all(status.state == "ready" and status.intake_age_s < _INTAKE_S for status in statuses)
        )

    def refusal(self, serving: Serving | None = None) -> ApiError | None:
        """Return the 503 for a new request to that model, or to any model; None if the request is accepted.

        While an engine restarts, requests are accepted and wait for it.
        """
        if self.draining:
            return ApiError(503, "the server is shutting down", code="shutting_down", retry_after=_RETRY_AFTER_S)
        refusals = [_refusal(one.engine.status().state) for one in ([serving] if serving else self._servings)]
        return None if None in refusals else refusals[0]

    @contextmanager
    def tracked(self) -> Iterator[None]:
        """Count a request, for which a drain waits."""
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def run(self) -> None:
        """Start the engines, then watch them until one fails or the task is cancelled."""
        starting = asyncio.create_task(self._start())
        try:
            while not starting.done():
                self._notifier.send("STATUS=loading the model", f"EXTEND_TIMEOUT_USEC={_START_EXTENSION_S * 1_000_000}")
                await asyncio.wait((starting,), timeout=_TICK_S)
            starting.result()
        except EngineError as error:
            self._fail(error.message)
            return
        except Exception as error:
            log.exception("the engine could not be started")
            self._fail(repr(error))
            return
        finally:
            starting.cancel()
        self._started = True
        self._notifier.send("READY=1")
        await self._watch()

    def reload(self) -> None:
        """Read the keys file again, changed or not, and notify systemd (sd_notify(3): RELOADING)."""
        if ready := self.ready():
            self._notifier.send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
        if self._keys:
            self._keys.reload()
        if ready:
            self._notifier.send("READY=1")

    def drain(self) -> None:
        """Start to drain: refuse new requests, let running ones finish until the deadline. Idempotent."""
        if self._drain_task is None:
            self.draining = True
            self._drain_task = asyncio.get_running_loop().create_task(self._drain())

    async def stop(self) -> None:
        """Stop the engines that are still running."""
        await asyncio.gather(*(engine.stop() for engine in self._engines if engine.status().state != "stopped"))

    async def _start(self) -> None:
        """Start the engines one by one, so that each one's memory check counts the memory of those before it."""
        for serving in self._servings:
            await serving.engine.start()
            if serving.engine.on_demand:
                continue
            status = serving.engine.status()
            settings = status.settings
            serving.admission.set_parallel(settings.parallel)
            log.info(
                "ready", model=serving.model, load_s=status.load_s, parallel=settings.parallel, batch=settings.batch
            )

    async def _watch(self) -> None:
        watchdog_s = self._notifier.watchdog_s
        tick = min(_TICK_S, watchdog_s / 3) if watchdog_s else _TICK_S
        while not (failed := [status for engine in self._engines if (status := engine.status()).state == "failed"]):
            if watchdog_s and self.alive():
                self._notifier.send("WATCHDOG=1")
            self._notifier.send(f"STATUS={self._describe()}")
            await asyncio.sleep(tick)
        self._fail(failed[0].last_error or "the engine failed")

    def _describe(self) -> str:
        statuses = [engine.status() for engine in self._engines]
        busy = sum(status.stats.slots_busy for status in statuses if status.stats)
        slots = sum(status.settings.parallel for status in statuses)
        queued = sum(serving.admission.queued for serving in self._servings)
        unready = [str(status.state) for status in statuses if status.state not in ("ready", "unloaded")]
        state = "draining" if self.draining else (unready or ["ready"])[0]
        (before, tokens), self._last_report = self._last_report, (time.monotonic(), self._totals.streamed)
        self.tokens_per_s = (self._totals.streamed - tokens) / max(1e-3, self._last_report[0] - before)
        return f"{state}: {busy} of {slots} slots busy, {queued} requests queued, {self.tokens_per_s:.0f} tokens/s"

    def _fail(self, message: str) -> None:
        log.error("engine failed", error=message)
        self._notifier.send(f"STATUS=engine failed: {message}")
        self.exit_code = 1
        self.over()

    async def _drain(self) -> None:
        log.info("draining", in_flight=self._in_flight, timeout_s=self._limits.drain_timeout_s)
        self._notifier.send("STOPPING=1", "STATUS=draining")
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), self._limits.drain_timeout_s)
        if self._in_flight:
            log.warning("drain deadline reached", cut_off=self._in_flight)
        await self.stop()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), _FLUSH_S)
        self.over()


def _refusal(state: EngineState) -> ApiError | None:
    if state == "loading":
        return ApiError(503, "the model is loading", code="model_loading", retry_after=_RETRY_AFTER_S)
    if state in ("failed", "stopped"):
        return ApiError(503, f"the engine has {state}", code="engine_stopped", retry_after=_RETRY_AFTER_S)
    return None
