"""Whether a setting keeps its limits: one rule for the search, the climb, the check in service and the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist, fmean

from llamaherd_loadtest.limits import Limit, QualityLimit
from llamaherd_loadtest.quality.divergence import Quality
from llamaherd_loadtest.quantiles import ERROR, Judgement, judge_share
from llamaherd_loadtest.tune.evidence import STEADY, Drift, Record, judge_errors, judge_over, limit_noise

_MIN_ANSWERS = 8  # the spread of fewer is too uncertain
_MARGIN = NormalDist().inv_cdf(1 - ERROR)  # standard deviations

Excess = tuple[Limit, float, float]  # mean and standard deviation of the logarithm of a figure over its limit


def judge(record: Record, excesses: Iterable[Excess], drift: Drift = STEADY) -> tuple[Judgement, str]:
    """Return the worst judgement and its limit (or "error_rate", "failure"); UNRESOLVED if the noise is too large.

    Each limit is also judged by the requests of all windows together.
    """
    errors = judge_errors(record.windows)
    worst = (errors, "" if errors is Judgement.PASSES else "error_rate")
    if errors is Judgement.MISSES:
        return worst
    if record.fault or record.failed_once:
        worst = (Judgement.UNRESOLVED, "failure")
    for limit, mean, sd in excesses:
        pooled = judge_over(record.windows, limit, drift)
        if mean - _MARGIN * sd > 0 or pooled is Judgement.MISSES:
            return Judgement.MISSES, limit.name
        if mean + _MARGIN * sd > 0 or pooled is Judgement.UNRESOLVED:
            worst = (Judgement.UNRESOLVED, limit.name)
    return worst


def judge_alone(record: Record, limits: Sequence[Limit], others: Iterable[Record] = ()) -> Judgement:
    """Judge a record by its own windows; their noise is pooled with that of `others`."""
    if not record.figures:
        return Judgement.UNRESOLVED
    excesses = list[Excess]()
    for limit in limits:
        seen = [m.observed[limit.name] for m in record.windows if limit.name in m.observed]
        mean = fmean(math.log(max(value, 1e-6) / limit.ms) for value in seen) if seen else -math.inf
        excesses.append((limit, mean, limit_noise([record, *others], limit).sigma / math.sqrt(max(len(seen), 1))))
    return judge(record, excesses)[0]


def judge_quality(quality: Quality, limits: Iterable[QualityLimit]) -> tuple[Judgement, str]:
    """Return the worst judgement and the limit's name.

    `same_top` is also judged as if positions were independent: where nearly all have the same top token, answers hardly
    differ from each other, and the interval over answers is too narrow.
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
    if quality.answers < _MIN_ANSWERS:
        return Judgement.UNRESOLVED, f"number of answers ({_MIN_ANSWERS} needed)"
    return worst
