"""Filter that compares a server's traffic with the workload that it was tuned for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Fewer requests say nothing about an average. An average has moved if it differs by this factor.
_LEAST_REQUESTS = 100
_FACTOR = 1.5


def traffic_moves(page: str, provenance: Mapping[str, Any], model: str) -> list[str]:
    """Return how prompts and answers of `model` differ from those it was tuned with, as a list of at most one line.

    `page` is the server's /metrics, which count from its start; `provenance` is from an entry of llamaherd_tuned.
    """
    asked = {kind: _mean(page, f"llamaherd_{kind}_tokens", model) for kind in ("prompt", "output")}
    tuned = provenance.get("mean_tokens", {})
    moved = [
        f"{word} of {asked[kind]:.0f} tokens on average, not {tuned[kind]}"
        for kind, word in (("prompt", "prompts"), ("output", "answers"))
        if asked[kind] and tuned.get(kind) and not 1 / _FACTOR <= asked[kind] / tuned[kind] <= _FACTOR
    ]
    if not moved:
        return []
    since = f"since its start {model} has {' and '.join(moved)} as in {provenance.get('workload', 'the workload')}"
    return [f"{since}, which it was tuned for: write its own with playbooks/workload.yml, and tune with that"]


def _mean(page: str, histogram: str, model: str) -> float:
    """Return the mean of the histogram's observations, or 0 if there are too few."""
    sums = {
        part: sum(
            float(value)
            for labels, value in re.findall(rf"(?m)^{histogram}_{part}{{(.*)}} (\S+)$", page)
            if f'model="{model}"' in labels
        )
        for part in ("sum", "count")
    }
    return sums["sum"] / sums["count"] if sums["count"] >= _LEAST_REQUESTS else 0.0


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"traffic_moves": traffic_moves}
