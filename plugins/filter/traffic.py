"""A filter that holds what a server is asked against what it was tuned for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Fewer say nothing of an average, which must be off by such a factor.
_LEAST_REQUESTS = 100
_FACTOR = 1.5


def traffic_moves(page: str, provenance: Mapping[str, Any], model: str) -> list[str]:
    """How prompts and answers of `model` differ from those that its tuned settings were measured with, a line at most.

    `page` is the server's /metrics since its start, `provenance` that of an entry of llamaherd_tuned.
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
    """Of all its observations; 0 where they are few."""
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
