"""Ramps users up evenly from one to --users over --run-time:

cd loadtest/locustfiles
locust -f chat.py,shapes/ramp.py --host https://host --users 32 --run-time 10m
"""

from __future__ import annotations

from llamaherd_loadtest.shapes import Shape


class Ramp(Shape):
    """Ramps users up evenly from one to --users over --run-time."""

    def share(self, progress: float) -> float:
        return progress
