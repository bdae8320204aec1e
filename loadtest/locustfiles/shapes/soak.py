"""Ramps up to --users in the first twentieth of --run-time and holds: hours of load, to find leaks:

cd loadtest/locustfiles
locust -f chat.py,shapes/soak.py --host https://host --users 32 --run-time 10m
"""

from __future__ import annotations

from llamaherd_loadtest.shapes import Shape


class Soak(Shape):
    """Ramps up to --users in the first twentieth of --run-time and holds: hours of load, to find leaks."""

    def share(self, progress: float) -> float:
        return min(1.0, progress * 20)
