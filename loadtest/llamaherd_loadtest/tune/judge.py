"""Does a setting keep its limits? One answer for the search, the climb, the check in service and the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist, fmean

from llamaherd_loadtest.limits import Limit, QualityLimit
from llamaherd_loadtest.quality.divergence import Quality
from llamaherd_loadtest.quantiles import ERROR, Judgement, judge_share
from llamaherd_loadtest.tune.evidence import Record, judge_errors, judge_over, limit_noise

_LEAST_ANSWERS = 8  # the spread of fewer is hardly known
_MARGIN = NormalDist().inv_cdf(1 - ERROR)  # standard deviations

Excess = tuple[Limit, float, float]  # mean and standard deviation of the logarithm of a figure over its limit


def judge(record: Record, excesses: Iterable[Excess]) -> tuple[Judgement, str]:
    """The worst judgement, and the limit's name (or "error_rate", "failure"); UNRESOLVED where the noise is too large.

    What the requests of all windows together show of each limit counts too.
    """
    errors = judge_errors(record.windows)
    worst = (errors, "" if errors is Judgement.PASSES else "error_rate")
    if errors is Judgement.MISSES:
        return worst
    if record.fault or record.failed_once:
        worst = (Judgement.UNRESOLVED, "failure")
    for limit, mean, sd in excesses:
        pooled = judge_over(record.windows, limit)
        if mean - _MARGIN * sd > 0 or pooled is Judgement.MISSES:
            return Judgement.MISSES, limit.name
        if mean + _MARGIN * sd > 0 or pooled is Judgement.UNRESOLVED:
            worst = (Judgement.UNRESOLVED, limit.name)
    return worst


def judge_alone(record: Record, limits: Sequence[Limit], others: Iterable[Record] = ()) -> Judgement:
    """By its own windows, whose noise is that of these and of `others`."""
    if not record.figures:
        return Judgement.UNRESOLVED
    excesses = list[Excess]()
    for limit in limits:
        seen = [m.observed[limit.name] for m in record.windows if limit.name in m.observed]
        mean = fmean(math.log(max(value, 1e-6) / limit.ms) for value in seen) if seen else -math.inf
        excesses.append((limit, mean, limit_noise([record, *others], limit).sigma / math.sqrt(max(len(seen), 1))))
    return judge(record, excesses)[0]


def judge_quality(quality: Quality, limits: Iterable[QualityLimit]) -> tuple[Judgement, str]:
    """The worst judgement, and the limit's name.

    A share of positions with the same top token is also held against what as many independent ones would show: where
    nearly all are the same, answers hardly differ.
    """
    worst = (Judgement.PASSES, "")
    for limit in limits:
        if limit.name == "kld":
            misses, passes = quality.kld.low > limit.value, quality.kld.high <= limit.value
        else:
            chance = judge_share(quality.positions - quality.same, quality.positions, 1 - limit.value, ERROR)
            misses = quality.same_top.high < limit.value
            passes = quality.same_top.low >= limit.value and chance is Judgement.PASSES
        if misses:
            return Judgement.MISSES, limit.name
        if not passes:
            worst = (Judgement.UNRESOLVED, limit.name)
    if quality.answers < _LEAST_ANSWERS:
        return Judgement.UNRESOLVED, f"number of answers ({_LEAST_ANSWERS} needed)"
    return worst
