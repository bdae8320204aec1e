"""Runs one closed-loop or open-loop measurement in this process. Importing this module applies gevent's patches."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator

import gevent
from locust.env import Environment
from msgspec import Struct

from llamaherd_loadtest.client import ChatClient, Target, clock
from llamaherd_loadtest.health import Health, HealthMonitor
from llamaherd_loadtest.samples import CUT_OFF, Sample
from llamaherd_loadtest.session import LoadSession, Share, Source
from llamaherd_loadtest.users import ClosedLoopUser

WARM_UP_S = 20.0  # timeout for the next user's warm-up, on top of two windows
_LONGEST_WINDOW = 4  # times the requested window
_STEP = 0.25  # of the requested window: the step by which a window is extended

logging.getLogger("locust").setLevel(logging.WARNING)


class Run(Struct, frozen=True):
    """The result of a run: samples, the full-load window on the client's clock, and the client's health."""

    samples: list[Sample]
    start: float
    end: float
    health: Health


class RunFailed(Exception):
    """The run had no full-load window; the message says why."""


class NotWarmedUp(RunFailed):
    """The load was not full in time, perhaps only because the server is slow. `waited_s` is how long it had."""

    def __init__(self, warmed: int, users: int, waited_s: float) -> None:
        super().__init__(f"only {warmed} of {users} users had warmed up after {waited_s:.0f} s")
        self.waited_s = waited_s


def closed_loop(
    target: Target,
    client: ChatClient,
    source: Source,
    *,
    concurrency: int,
    window_s: float,
    warm_up_s: float,
    rounds: int = 2,
) -> Run:
    """Keep `concurrency` requests in flight, warm up, then measure for `window_s` seconds. On a slow host the window
    extends to up to four times that, until it holds `rounds` requests per user.

    The window opens when every user has finished its warm-up request. Users send their next request without a pause, so
    the load is full from the start. Raises NotWarmedUp if no further user warms up within `warm_up_s` seconds, and
    RunFailed if requests only fail.
    """
    environment = Environment(host=target.url)
    session = LoadSession(client, source, environment.events.request.fire)
    environment.user_classes = [type("ChatUser", (ClosedLoopUser,), {"session": session})]
    runner = environment.create_local_runner()
    try:
        runner.start(concurrency, spawn_rate=concurrency)
        _wait_for_full_load(session, concurrency, warm_up_s)
        monitor, start = HealthMonitor(), clock()
        _wait_for_requests(session, rounds * concurrency, window_s)
        end = clock()
        cpu, lag = monitor.stop()
    finally:
        runner.quit()
    if session.only_failures.is_set():
        raise RunFailed(_last_error(session))
    in_flight = sum(max(0.0, min(s.end, end) - max(s.sent, start)) for s in session.samples) / (end - start)
    return Run(session.samples, start, end, Health(cpu=cpu, lag_p95_s=lag, concurrency=in_flight / concurrency))


def at_once(client: ChatClient, source: Source, *, concurrency: int, within_s: float) -> list[Sample]:
    """Send `concurrency` requests at the same time and cut off those not answered within `within_s` seconds."""
    session = LoadSession(client, source, lambda **_: None, Share(total=concurrency))
    dispatcher = gevent.spawn(session.dispatch, clock(), itertools.repeat(0.0))
    dispatcher.join(within_s)
    dispatcher.kill()
    return session.samples


def open_loop(
    client: ChatClient,
    source: Source,
    offsets: Iterator[float],
    *,
    total: int,
    warm_up_s: float = 0.0,
    drain_s: float | None = None,
) -> Run:
    """Send `total` requests at `offsets` (seconds from now), however slow the answers are, and wait for all of them.

    Requests of the first `warm_up_s` seconds are not counted; the window opens after them. Raises RunFailed if requests
    only fail, or if some are unanswered `drain_s` seconds after the last one was sent: the answers received by then
    would be only the fast ones.
    """
    session = LoadSession(client, source, lambda **_: None, Share(total=total))
    monitor, start = HealthMonitor(), clock()
    arrivals = list(itertools.islice(offsets, total))
    dispatcher = gevent.spawn(session.dispatch, start, iter(arrivals), warm_up_s)
    dispatcher.join(None if drain_s is None else arrivals[-1] + drain_s)
    dispatcher.kill()
    end = clock()
    cpu, lag = monitor.stop(start + warm_up_s)
    if session.only_failures.is_set():
        raise RunFailed(_last_error(session))
    if late := sum(s.outcome == CUT_OFF for s in session.samples):
        raise RunFailed(f"{late} of {total} requests were not answered within {drain_s:g} s after the last was sent")
    return Run(session.samples, start + warm_up_s, end, Health(cpu=cpu, lag_p95_s=lag))


def _wait_for_full_load(session: LoadSession, concurrency: int, timeout_s: float) -> None:
    started, warmed, deadline = clock(), 0, clock() + timeout_s
    while session.warmed < concurrency:
        if session.only_failures.is_set():
            raise RunFailed(_last_error(session))
        if session.warmed > warmed:  # a server that makes progress is only slow
            warmed, deadline = session.warmed, clock() + timeout_s
        if clock() > deadline:
            raise NotWarmedUp(warmed, concurrency, clock() - started)
        gevent.sleep(0.01)


def _wait_for_requests(session: LoadSession, least: int, window_s: float) -> None:
    least += session.completed
    longest = clock() + _LONGEST_WINDOW * window_s
    session.only_failures.wait(window_s)
    while session.completed < least and not session.only_failures.is_set() and clock() < longest:
        session.only_failures.wait(_STEP * window_s)


def _last_error(session: LoadSession) -> str:
    failed = [s for s in session.samples if s.detail]
    return f"all requests fail, the last with {failed[-1].outcome}: {failed[-1].detail}" if failed else "requests fail"
