"""Latency limits by name, such as `ttft_p95=2s`."""

from __future__ import annotations

import re

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


def observe(limit: Limit, samples: list[Sample]) -> float | None:
    """The limited figure of these requests, milliseconds; None where no request has it."""
    values = sorted(v * 1000 for s in samples if s.outcome == OK for v in _values(limit.metric, s))
    return quantile(values, limit.p) if values else None


def _values(metric: str, sample: Sample) -> list[float]:
    if metric == "itl":
        return sample.gaps
    value = {"ttft": sample.ttft, "tpot": sample.tpot, "gap": sample.largest_gap, "e2e": sample.e2e}[metric]
    return [] if value is None else [value]
