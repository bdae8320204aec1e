"""Finds the load that the chosen settings can carry within the limits: doubles the requests in flight, then bisects."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from llamaherd_loadtest.quantiles import Judgement
from llamaherd_loadtest.tune.evidence import Measurement

_TRIES = 3  # windows for a load that one window leaves unresolved
_MAX_LOAD_PER_SLOT = 4  # times the slots: beyond it, requests only wait


class Capacity(Struct, frozen=True):
    """The highest load that kept the limits and the lowest that did not, in requests in flight.

    They are 0 and None if no tested load did so. `arrivals` judges `rate` requests per second that arrive at random (an
    open loop), most of what the highest load answered; it is None if there was no time for it.
    """

    keeps: int
    misses: int | None
    rate: float = 0.0
    arrivals: Judgement | None = None

    def __str__(self) -> str:
        if not self.keeps:
            return "not even one request in flight keeps the limits"
        beyond = f"{self.misses} do not" if self.misses else "more were not tried"
        climbed = f"{self.keeps} requests in flight keep the limits, {beyond}"
        if self.arrivals is None:
            return climbed
        verb = {"passes": "keep them", "misses": "do not", "unresolved": "are too close to tell"}[self.arrivals]
        return f"{climbed}; {self.rate:.2g} requests/s that arrive at random {verb}"


def find_capacity(measure: Callable[[int], Judgement | None], slots: int) -> Capacity | None:
    """Double the load from 1 to four times the `slots`, then bisect between what passed and what did not.

    `measure` returns None when time is up; the result is then what is known so far, or None if nothing is.
    """
    keeps, misses, load = 0, None, 1
    while (judgement := measure(load)) is not None:
        if judgement is Judgement.PASSES:
            keeps = load
        else:
            misses = load
        if misses is None and load >= _MAX_LOAD_PER_SLOT * slots:
            break
        load = 2 * load if misses is None else (keeps + misses) // 2
        if load in (keeps, 0):
            break
    return Capacity(keeps, misses) if keeps or misses else None


def settle(
    measure: Callable[[], Measurement | None], decide: Callable[[list[Measurement]], Judgement]
) -> Judgement | None:
    """Measure one load until it is decided, three windows at most; None if the time is up before the first."""
    windows: list[Measurement] = []
    for _ in range(_TRIES):
        window = measure()
        if window is None:
            break
        windows.append(window)
        if decide(windows) is not Judgement.UNRESOLVED:
            break
    return decide(windows) if any(not m.invalid for m in windows) else None
