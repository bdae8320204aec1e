"""When an open loop sends its requests: at times fixed before the run, whatever the server does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

from msgspec import Struct

from llamaherd_loadtest.rng import seeded

Process = Literal["constant", "poisson", "bursts"]
PROCESSES: tuple[str, ...] = get_args(Process)


class Arrivals(Struct, frozen=True):
    """`rate` requests per second, reproducible from the seed.

    They are evenly spaced, a Poisson process, or bursts of `burst` requests at the times of a Poisson process.
    """

    process: Process
    rate: float
    seed: int
    burst: int = 8

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ValueError(f"invalid rate {self.rate:g}: must be above 0 requests per second")
        if self.burst < 1:
            raise ValueError(f"invalid burst {self.burst}: must be at least 1 request")

    def offsets(self) -> Iterator[float]:
        """Yield seconds from the start of the run, without end."""
        rng, at = seeded(self.seed, "arrivals"), 0.0
        at_once = self.burst if self.process == "bursts" else 1
        while True:
            at += 1 / self.rate if self.process == "constant" else rng.expovariate(self.rate / at_once)
            for _ in range(at_once):
                yield at
