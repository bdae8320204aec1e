"""Quantiles with a 95 % interval from order statistics, and the word "unresolved" where the sample is too small.

No distribution is assumed: the interval of the p-quantile runs between the order statistics whose ranks bound a
Binomial(n, p) at 2.5 % on each side. p95 has one from 72 values on, p99 from 368.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from msgspec import Struct

_TAIL = 0.025


class Quantile(Struct, frozen=True):
    """A quantile and its interval, in the unit of the values; `low` and `high` are None where unresolved."""

    p: float
    value: float
    low: float | None
    high: float | None

    @property
    def resolved(self) -> bool:
        return self.low is not None


def quantile(ordered: Sequence[float], p: float) -> float:
    """The p-quantile of sorted values, linear between neighbours (Hyndman and Fan's type 7)."""
    at = p * (len(ordered) - 1)
    below = math.floor(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (at - below) * (ordered[above] - ordered[below])


def estimate(ordered: Sequence[float], p: float) -> Quantile:
    """The p-quantile of sorted values with its interval."""
    ranks = _interval_ranks(len(ordered), p)
    low, high = (ordered[ranks[0] - 1], ordered[ranks[1] - 1]) if ranks else (None, None)
    return Quantile(p, quantile(ordered, p), low, high)


def _interval_ranks(n: int, p: float) -> tuple[int, int] | None:
    """Ranks (from 1) of the interval's ends; None where the sample holds no such value."""
    spread = math.sqrt(n * p * (1 - p))
    if spread > 30:
        reach = NormalDist().inv_cdf(1 - _TAIL) * spread
        return math.floor(n * p - reach), math.ceil(n * p + reach) + 1
    low = high = 0
    mass = 0.0
    for k in range(n):  # mass: P(fewer than or exactly k values lie below the quantile)
        mass += math.exp(_log_binomial(n, k, p))
        if mass <= _TAIL:
            low = k + 1
        if mass >= 1 - _TAIL:
            high = k + 1
            break
    return (low, high) if low and high else None


def _log_binomial(n: int, k: int, p: float) -> float:
    choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return choose + k * math.log(p) + (n - k) * math.log1p(-p)
