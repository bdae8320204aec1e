"""What a search improves: throughput with full slots, or a latency at a given load."""

from __future__ import annotations

import re

from msgspec import Struct

from llamaherd_loadtest.limits import METRICS, Limit, parse_limit
from llamaherd_loadtest.tune.evidence import SLOTS, Load

_THROUGHPUTS = {"tokens": "output tokens/s", "requests": "requests/s"}


class Objective(Struct, frozen=True):
    """A throughput to maximise, or the latency of `limit` to minimise."""

    name: str = "tokens"
    limit: Limit | None = None

    def score(self, tokens_per_s: float, requests_per_s: float, latency_ms: float | None) -> float:
        """Return the score, higher is better: the throughput, or 1000 / latency in ms (0 if no request had one)."""
        if self.limit is not None:
            return 1000 / latency_ms if latency_ms else 0.0
        return requests_per_s if self.name == "requests" else tokens_per_s

    def in_words(self, gain: float, margin: float) -> str:
        """Format a gain of the score ± half its interval, as "+12% ± 3% output tokens/s" or "ttft_p95 -11% ± 3%"."""
        if self.limit is None:
            return f"{gain:+.0%} ± {margin:.0%} {_THROUGHPUTS[self.name]}"
        return f"{self.name} {1 / (1 + gain) - 1:+.0%} ± {margin / (1 + gain):.0%}"


TOKENS = Objective()


def parse_objective(name: str, load: Load) -> Objective:
    """Parse `tokens`, `requests` or a latency such as `ttft_p95`. Raises ValueError, also for a wrong `load`."""
    if name in _THROUGHPUTS:
        if load.rate:
            raise ValueError(
                f"a load of {load.rate:g}/s fixes the throughput: give a latency as objective, such as e2e_p95"
            )
        return Objective(name)
    try:
        limit = parse_limit(f"{name}=1s")
    except ValueError:
        some = ", ".join(f"{metric}_p95" for metric in METRICS)
        raise ValueError(f"invalid objective {name!r}: write tokens, requests, or a latency ({some} …)") from None
    if load == SLOTS:
        raise ValueError(f"objective {name} needs a load: --load 4 (requests in flight) or --load 2/s (arrivals)")
    return Objective(name, limit)


def parse_load(text: str) -> Load:
    """Parse requests in flight (`4`) or arrivals (`2/s`); empty means one request per slot. Raises ValueError."""
    if not text:
        return SLOTS
    match = re.fullmatch(r"(\d+(?:\.\d+)?)/s|(\d+)", text.strip())
    if match is None or not float(match[1] or match[2]):
        raise ValueError(f"invalid load {text!r}: write for example 4 (requests in flight) or 2/s (arrivals)")
    return Load(rate=float(match[1])) if match[1] else Load(int(match[2]))
