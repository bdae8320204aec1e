"""Latency limits by name, such as `ttft_p95=2s` or `mlperf-llama2-70b`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from msgspec import Struct

from llamaherd_loadtest.quantiles import Judgement, judge_share, quantile, unbiased_quantile
from llamaherd_loadtest.samples import OK, Sample

QUALITY = ("same_top", "kld", "valid")
METRICS = ("ttft", "tpot", "itl", "gap", "e2e")
MAX_ERROR_SHARE = 0.01
_SIGNIFICANCE = 0.05  # significance level of the test for a share of errors above MAX_ERROR_SHARE
_FORM = re.compile(
    rf"(?P<name>(?P<metric>{'|'.join(METRICS)})_(p(?P<p>\d\d?)|max))=(?P<value>\d+(\.\d+)?)(?P<unit>ms|s)"
)

_QUALITY_FORM = re.compile(rf"(?P<name>{'|'.join(QUALITY)})=(?P<value>\d*\.?\d+)")


class Limit(Struct, frozen=True):
    """At most `ms` milliseconds for the quantile `p` of `metric` (1.0: the maximum)."""

    name: str
    metric: str
    p: float
    ms: float


class QualityLimit(Struct, frozen=True):
    """How far answers may change: `same_top` is the lowest share of positions with the same most likely token, `kld`
    the highest mean KL divergence in nats, `valid` the lowest share of valid tool calls and JSON that remains valid."""

    name: str
    value: float


class Judged(Struct, frozen=True):
    """A limit applied to requests: `over` of `of` values exceed it, including those of requests in flight that are
    already past it. The judgement has 95 % confidence."""

    limit: Limit
    over: int
    of: int
    judgement: Judgement


def divide_limits(texts: Sequence[str]) -> tuple[list[Limit], list[QualityLimit]]:
    """Parse limits and split them into latency and answer limits. Raises ValueError with the remedy."""
    quality = [text for text in texts if text.strip().partition("=")[0] in QUALITY]
    latency = [limit for text in texts if text not in quality for limit in parse_limits(text)]
    return latency, [*map(parse_quality_limit, quality)]


def parse_quality_limit(text: str) -> QualityLimit:
    """Parse `same_top=share`, `valid=share` or `kld=nats`. Raises ValueError with the remedy."""
    match = _QUALITY_FORM.fullmatch(text.strip())
    most = {"same_top": 0.9999, "valid": 1.0}
    if match is None or not 0 < float(match["value"]) <= most.get(match["name"], math.inf):
        example = "same_top=0.98 or valid=0.9 (shares), or kld=0.02"
        raise ValueError(f"invalid limit {text!r}: write for example {example}")
    return QualityLimit(match["name"], float(match["value"]))


def parse_limit(text: str) -> Limit:
    """Parse `metric_pNN=value` or `metric_max=value` with the value in ms or s. Raises ValueError with the remedy."""
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"invalid limit {text!r}: write for example ttft_p95=2s (one of {', '.join(METRICS)}), or "
            "same_top=0.98 or kld=0.02"
        )
    p = int(match["p"]) / 100 if match["p"] else 1.0
    return Limit(match["name"], match["metric"], p, float(match["value"]) * (1000 if match["unit"] == "s" else 1))


# p99 of TTFT and TPOT in ms for MLPerf Inference's server ("conversational") and interactive scenarios, from the rules'
# table of datacenter benchmarks: github.com/mlcommons/inference_policies, inference_rules.adoc (2026-08, ff7edba).
_MLPERF = {
    "mlperf-llama3.1-8b": (2000, 100),
    "mlperf-llama3.1-8b-interactive": (500, 30),
    "mlperf-llama2-70b": (2000, 200),
    "mlperf-llama2-70b-interactive": (450, 40),
    "mlperf-mixtral-8x7b": (2000, 200),
    "mlperf-llama3.1-405b": (6000, 175),
    "mlperf-llama3.1-405b-interactive": (4500, 80),
    "mlperf-deepseek-r1": (2000, 80),
    "mlperf-deepseek-r1-interactive": (1500, 15),
    "mlperf-gpt-oss-120b": (3000, 80),
    "mlperf-gpt-oss-120b-interactive": (2000, 20),
}


def parse_limits(text: str) -> list[Limit]:
    """Parse one limit, or the name of an MLPerf pair of limits. Raises ValueError with the remedy."""
    if not text.startswith("mlperf-"):
        return [parse_limit(text)]
    if text not in _MLPERF:
        raise ValueError(f"unknown limit {text!r}; available: {', '.join(_MLPERF)}")
    ttft, tpot = _MLPERF[text]
    return [parse_limit(f"ttft_p99={ttft}ms"), parse_limit(f"tpot_p99={tpot}ms")]


def meets(limits: Sequence[Limit], sample: Sample) -> bool:
    """Return whether a request keeps all limits; its gaps count by the limit's own quantile. An error never does."""
    return sample.outcome == OK and all(
        quantile(values, limit.p) * 1000 <= limit.ms
        for limit in limits
        if (values := sorted(_values(limit.metric, sample)))
    )


def missed_already(limit: Limit, sample: Sample, at: float) -> bool:
    """Return whether a request in flight at time `at` of the client's clock already exceeds the limit."""
    waits = sample.first is None or sample.first > at
    if limit.metric == "gap" and sample.last is not None and sample.last <= at:
        return 1000 * (min(at, sample.end) - sample.last) > limit.ms
    return (limit.metric == "e2e" or (limit.metric == "ttft" and waits)) and 1000 * (at - sample.scheduled) > limit.ms


def judge(limit: Limit, ended: Sequence[Sample], waiting: Sequence[Sample], at: float) -> Judged:
    """Apply a limit to requests that `ended`, and to those still `waiting` at the end of the window, `at`."""
    values = [value for s in ended if s.outcome == OK for value in _values(limit.metric, s)]
    late = sum(missed_already(limit, s, at) for s in waiting)
    over, of = late + sum(1000 * value > limit.ms for value in values), late + len(values)
    return Judged(limit, over, of, judge_share(over, of, 1 - limit.p))


def judge_errors(errors: int, total: int) -> Judgement:
    """Judge whether at most 1 % of requests fail. One or two failures among 81 requests do not decide it."""
    if errors <= MAX_ERROR_SHARE * total:
        return Judgement.PASSES
    judgement = judge_share(errors, total, MAX_ERROR_SHARE, _SIGNIFICANCE)
    return Judgement.MISSES if judgement is Judgement.MISSES else Judgement.UNRESOLVED


def observe(limit: Limit, samples: list[Sample], *, unbiased: bool = False) -> float | None:
    """The figure that `limit` bounds, in milliseconds over these requests; None if no request has it.

    `unbiased` estimates the quantile of all requests that could be sent, instead of taking that of the sample.
    """
    values = sorted(v * 1000 for s in samples if s.outcome == OK for v in _values(limit.metric, s))
    figure = unbiased_quantile if unbiased else quantile
    return figure(values, limit.p) if values else None


def _values(metric: str, sample: Sample) -> list[float]:
    if metric == "itl":
        return sample.gaps
    value = {"ttft": sample.ttft, "tpot": sample.tpot, "gap": sample.largest_gap, "e2e": sample.e2e}[metric]
    return [] if value is None else [value]
