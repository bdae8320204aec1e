"""Locust users. Importing this module patches the standard library for gevent, as Locust does."""

from __future__ import annotations

import gevent.pool
from locust import User, task

from llamaherd_loadtest.arrivals import Arrivals
from llamaherd_loadtest.client import clock
from llamaherd_loadtest.session import LoadSession


class ClosedLoopUser(User):  # type: ignore[misc]  # Locust is untyped
    """Asks, reads the answer to its end, asks again: as many requests in flight as there are users."""

    abstract = True
    session: LoadSession

    def on_start(self) -> None:
        self.session.warm_up()

    @task  # type: ignore[untyped-decorator]
    def chat(self) -> None:
        self.session.send()


class OpenLoopUser(User):  # type: ignore[misc]
    """One dispatcher that sends at precomputed times, however slow the answers are.

    A wait between tasks would not do: it starts after the answer, so a slow server is asked less (a closed loop).
    """

    abstract = True
    fixed_count = 1
    session: LoadSession
    arrivals: Arrivals

    @task  # type: ignore[untyped-decorator]
    def dispatch(self) -> None:
        in_flight = gevent.pool.Group()
        start = clock()
        try:
            for offset in self.arrivals.offsets():
                scheduled = start + offset
                gevent.sleep(max(0.0, scheduled - clock()))
                in_flight.start(gevent.Greenlet(self.session.send, scheduled))
        finally:
            in_flight.kill()
