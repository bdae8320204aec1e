"""Locust users. Importing this module patches the standard library for gevent, as Locust does."""

from __future__ import annotations

import gevent
from locust import User, task

from llamaherd_loadtest.session import LoadSession


class ClosedLoopUser(User):  # type: ignore[misc]  # Locust is untyped
    """Sends a request, reads the answer to its end, and repeats. Requests in flight equal the number of users."""

    abstract = True
    session: LoadSession

    def on_start(self) -> None:
        self.session.warm_up()

    @task  # type: ignore[untyped-decorator]  # Locust is untyped
    def chat(self) -> None:
        self.session.send()


class OpenLoopUser(User):  # type: ignore[misc]  # Locust is untyped
    """Represents the dispatcher of an open loop in Locust's user count. The session sends, at precomputed times.

    Locust's wait between tasks starts after the answer, so a slow server would get fewer requests (a closed loop).
    """

    abstract = True
    fixed_count = 1
    session: LoadSession

    @task  # type: ignore[untyped-decorator]  # Locust is untyped
    def idle(self) -> None:
        gevent.sleep(1.0)
