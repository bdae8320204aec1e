"""Holds a fifth of --users, but all of them in the middle tenth of --run-time:

cd loadtest/locustfiles
locust -f chat.py,shapes/spike.py --host https://host --users 32 --run-time 10m
"""

from __future__ import annotations

from llamaherd_loadtest.shapes import Shape


class Spike(Shape):
    """Holds a fifth of --users, but all of them in the middle tenth of --run-time."""

    def share(self, progress: float) -> float:
        return 1.0 if 0.45 <= progress < 0.55 else 0.2
