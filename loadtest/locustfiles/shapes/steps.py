"""Raises the load to --users in five equal steps over --run-time:

cd loadtest/locustfiles
locust -f chat.py,shapes/steps.py --host https://host --users 32 --run-time 10m
"""

from __future__ import annotations

from llamaherd_loadtest.shapes import Shape


class Steps(Shape):
    """Raises the load to --users in five equal steps over --run-time."""

    def share(self, progress: float) -> float:
        return (int(progress * 5) + 1) / 5
