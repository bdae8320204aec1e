"""Latency limits by name, such as `ttft_p95=2s` or `mlperf-llama2-70b`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from msgspec import Struct

from llamaherd_loadtest.quantiles import quantile
from llamaherd_loadtest.samples import OK, Sample

METRICS = ("ttft", "tpot", "itl", "gap", "e2e")
_FORM = re.compile(
    rf"(?P<name>(?P<metric>{'|'.join(METRICS)})_(p(?P<p>\d\d?)|max))=(?P<value>\d+(\.\d+)?)(?P<unit>ms|s)"
)


class Limit(Struct, frozen=True):
    """`metric`'s quantile `p` (1.0: the maximum) may be at most `ms` milliseconds."""

    name: str
    metric: str
    p: float
    ms: float


def parse_limit(text: str) -> Limit:
    """Read `metric_pNN=value` or `metric_max=value`, the value in ms or s. Raises ValueError with the remedy."""
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"limit {text!r} is not understood: write for example ttft_p95=2s (one of {', '.join(METRICS)})"
        )
    p = int(match["p"]) / 100 if match["p"] else 1.0
    return Limit(match["name"], match["metric"], p, float(match["value"]) * (1000 if match["unit"] == "s" else 1))


# p99 of TTFT and TPOT in ms, of MLPerf Inference's server ("conversational") and interactive scenarios: the rules'
# table of datacenter benchmarks, github.com/mlcommons/inference_policies, inference_rules.adoc (2026-08, ff7edba).
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
    """Read one limit, or the two that a name of MLPerf's stands for. Raises ValueError with the remedy."""
    if not text.startswith("mlperf-"):
        return [parse_limit(text)]
    if text not in _MLPERF:
        raise ValueError(f"limit {text!r} is not known: MLPerf's are {', '.join(_MLPERF)}")
    ttft, tpot = _MLPERF[text]
    return [parse_limit(f"ttft_p99={ttft}ms"), parse_limit(f"tpot_p99={tpot}ms")]


def meets(limits: Sequence[Limit], sample: Sample) -> bool:
    """Whether one request keeps all limits; of its gaps the limit's own quantile counts. An error never does."""
    return sample.outcome == OK and all(
        quantile(values, limit.p) * 1000 <= limit.ms
        for limit in limits
        if (values := sorted(_values(limit.metric, sample)))
    )


def missed_already(limits: Sequence[Limit], sample: Sample, at: float) -> bool:
    """Whether a request that is in flight `at` that time of the client's clock is past one of the limits."""
    age_ms = 1000 * (at - sample.scheduled)
    waits = sample.first is None or sample.first > at
    return any(age_ms > limit.ms for limit in limits if limit.metric == "e2e" or (limit.metric == "ttft" and waits))


def observe(limit: Limit, samples: list[Sample]) -> float | None:
    """The limited figure of these requests, milliseconds; None where no request has it."""
    values = sorted(v * 1000 for s in samples if s.outcome == OK for v in _values(limit.metric, s))
    return quantile(values, limit.p) if values else None


def _values(metric: str, sample: Sample) -> list[float]:
    if metric == "itl":
        return sample.gaps
    value = {"ttft": sample.ttft, "tpot": sample.tpot, "gap": sample.largest_gap, "e2e": sample.e2e}[metric]
    return [] if value is None else [value]
