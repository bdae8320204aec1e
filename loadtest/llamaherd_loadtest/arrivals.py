"""When requests of an open loop are sent: times fixed before the run, whatever the server does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

from msgspec import Struct

from llamaherd_loadtest.dice import seeded

Process = Literal["constant", "poisson"]
PROCESSES: tuple[str, ...] = get_args(Process)


class Arrivals(Struct, frozen=True):
    """`rate` requests a second, evenly spaced or as a Poisson process; the same for the same seed."""

    process: Process
    rate: float
    seed: int

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ValueError(f"rate {self.rate:g} is not possible: give requests per second above 0")

    def offsets(self) -> Iterator[float]:
        """Seconds from the start of the run, without end."""
        rng, at = seeded(self.seed, "arrivals"), 0.0
        while True:
            at += 1 / self.rate if self.process == "constant" else rng.expovariate(self.rate)
            yield at
