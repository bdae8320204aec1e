"""Common base of the load shapes: users as a share of --users, by the elapsed part of --run-time."""

from __future__ import annotations

from abc import abstractmethod

from locust import LoadTestShape
from locust.exception import StopTest


class Shape(LoadTestShape):  # type: ignore[misc]  # Locust is untyped
    """A shape over --run-time that peaks at --users."""

    abstract = True
    use_common_options = True

    @abstractmethod
    def share(self, progress: float) -> float:
        """Return the share of --users, 0 to 1, when `progress` (0 to 1) of --run-time has passed."""

    def tick(self) -> tuple[int, float] | None:
        """Return (users, users to start per second), and None at the end. Locust calls this once a second."""
        options = self.runner.environment.parsed_options
        if not options.run_time or not options.num_users:
            raise StopTest("a load shape needs --users and --run-time")
        progress = self.get_run_time() / options.run_time
        users = max(1, round(self.share(progress) * options.num_users))
        return (users, users) if progress < 1 else None
