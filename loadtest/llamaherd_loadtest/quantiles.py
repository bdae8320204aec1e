"""Quantiles and shares with 95 % intervals, or "unresolved" where the sample is too small.

Intervals of quantiles assume no distribution: that of the p-quantile runs between the order statistics whose ranks
bound a Binomial(n, p) at 2.5 % on each side. p95 has one from 72 values on, p99 from 368.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from statistics import NormalDist, stdev

from msgspec import Struct

ERROR = 0.05  # probability of a wrong "passes" (or "misses") for a value exactly at the limit
_TAIL = 0.025


class Quantile(Struct, frozen=True):
    """A quantile and its interval, in the unit of the values; `low` and `high` are None if unresolved."""

    p: float
    value: float
    low: float | None
    high: float | None

    @property
    def resolved(self) -> bool:
        return self.low is not None


class Judgement(StrEnum):
    """Whether a limit is kept. UNRESOLVED: too close to it for the noise, or too few values to decide."""

    PASSES = "passes"
    UNRESOLVED = "unresolved"
    MISSES = "misses"


class Share(Struct, frozen=True):
    """A share of requests and its Wilson interval, all between 0 and 1."""

    value: float
    low: float
    high: float


def share(count: int, of: int) -> Share | None:
    """Return `count` of `of` as a share; None if `of` is 0."""
    if not of:
        return None
    z, value = NormalDist().inv_cdf(1 - _TAIL), count / of
    middle, scale = value + z * z / (2 * of), 1 + z * z / of
    reach = z * math.sqrt(value * (1 - value) / of + z * z / (4 * of * of))
    return Share(value, max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale))


def judge_share(count: int, of: int, allowed: float, tail: float = _TAIL) -> Judgement:
    """Judge by a sample (`count` of `of`) whether the true share is at most `allowed`, with an error of at most `tail`
    on either side. A quantile p keeps its limit exactly if the share of values above it is at most 1 - p."""
    if allowed <= 0:
        return Judgement.MISSES if count else Judgement.PASSES if of else Judgement.UNRESOLVED
    if not of:
        return Judgement.UNRESOLVED
    at_most = _binomial_cdf(count, of, allowed)
    fewer = _binomial_cdf(count - 1, of, allowed)
    if 1 - fewer < tail:
        return Judgement.MISSES
    return Judgement.PASSES if at_most < tail else Judgement.UNRESOLVED


def unbiased_quantile(ordered: Sequence[float], p: float) -> float:
    """Estimate the p-quantile of the distribution that sorted values are sampled from; `quantile` of a few is too low.

    The p95 of 8 values lies on average at the 89th percentile. The distance between the two percentiles of a normal
    distribution, in standard deviations, is added (Blom's approximation of its order statistics).
    """
    found, n = quantile(ordered, p), len(ordered)
    if not 0 < p < 1 or n < 2:
        return found
    at = p * (n - 1)
    below, normal = math.floor(at), NormalDist()
    ranks = [normal.inv_cdf((min(rank, n - 1) + 0.625) / (n + 0.25)) for rank in (below, below + 1)]
    expected = ranks[0] + (at - below) * (ranks[1] - ranks[0])
    return max(found + (normal.inv_cdf(p) - expected) * stdev(ordered), 0.0)


def quantile(ordered: Sequence[float], p: float) -> float:
    """The p-quantile of sorted values, interpolated linearly (Hyndman and Fan's type 7)."""
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
    """Ranks (from 1) of the interval's ends; None if the sample is too small to contain them."""
    spread = math.sqrt(n * p * (1 - p))
    if spread > 30:
        reach = NormalDist().inv_cdf(1 - _TAIL) * spread
        return math.floor(n * p - reach), math.ceil(n * p + reach) + 1
    low = high = 0
    mass = 0.0
    for k in range(n):  # mass: P(at most k values lie below the quantile)
        mass += math.exp(_log_binomial(n, k, p))
        if mass <= _TAIL:
            low = k + 1
        if mass >= 1 - _TAIL:
            high = k + 1
            break
    return (low, high) if low and high else None


def _binomial_cdf(k: int, n: int, p: float) -> float:
    """P(at most k of n)."""
    if k < 0 or k >= n:
        return float(k >= 0)
    spread = math.sqrt(n * p * (1 - p))
    if spread > 30:
        return NormalDist().cdf((k + 0.5 - n * p) / spread)
    return min(1.0, sum(math.exp(_log_binomial(n, i, p)) for i in range(k + 1)))


def _log_binomial(n: int, k: int, p: float) -> float:
    choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return choose + k * math.log(p) + (n - k) * math.log1p(-p)
