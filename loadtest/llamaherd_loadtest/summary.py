"""What a run's samples add up to. Only the full-load window counts; see `summarise`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from msgspec import Struct

from llamaherd_loadtest.health import Health
from llamaherd_loadtest.quantiles import Quantile, estimate
from llamaherd_loadtest.samples import CUT_OFF, OK, Sample

SCHEMA = "llamaherd.summary/1"
QUANTILES = (0.5, 0.9, 0.95, 0.99)


class Distribution(Struct, frozen=True):
    """Quantiles in milliseconds, over `count` values."""

    count: int
    mean: float
    max: float
    quantiles: list[Quantile]


class Summary(Struct, frozen=True, kw_only=True):
    """One run. Rates are per second of the window, latencies milliseconds.

    `inter_chunk` is set where events carry more than one token on average (events / tokens < 0.8): `itl` then holds
    gaps between chunks, not tokens. `fault` says why the run is invalid, where it is.
    """

    schema: str = SCHEMA
    window_s: float
    requests: int
    errors: dict[str, int]
    cut_off: int
    output_tokens_per_s: float
    requests_per_s: float
    ttft: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    largest_gap: Distribution | None
    e2e: Distribution | None
    schedule_delay: Distribution | None
    prompt_tokens: Distribution | None
    cached_tokens: int
    inter_chunk: bool
    health: Health
    fault: str


def counted(samples: Iterable[Sample], start: float, end: float) -> list[Sample]:
    """The requests a figure may rest on: not warming up, over within the window, not cut off."""
    return [s for s in samples if not s.warmup and s.outcome != CUT_OFF and start <= s.end <= end]


def distribution(values: Iterable[float | None], scale: float = 1000.0) -> Distribution | None:
    """Summarise values (seconds, unless `scale` says otherwise), leaving out None; None where nothing is left."""
    ordered = sorted(v * scale for v in values if v is not None)
    if not ordered:
        return None
    return Distribution(
        len(ordered), sum(ordered) / len(ordered), ordered[-1], [estimate(ordered, p) for p in QUANTILES]
    )


def summarise(samples: Sequence[Sample], start: float, end: float, health: Health) -> Summary:
    """Summarise the window [start, end] of the client's clock.

    Tokens count by the time they arrived, those of requests that began before the window or were cut off after it
    included: the server made them in the window. Latencies are of requests that ended in it.
    """
    inside = counted(samples, start, end)
    ok = [s for s in inside if s.outcome == OK]
    events, tokens = sum(s.events for s in ok), sum(s.tokens for s in ok)
    window = end - start
    return Summary(
        window_s=window,
        requests=len(ok),
        errors=dict(Counter(s.outcome for s in inside if s.outcome != OK)),
        cut_off=sum(s.outcome == CUT_OFF for s in samples),
        output_tokens_per_s=sum(s.tokens_between(start, end) for s in samples) / window,
        requests_per_s=len(ok) / window,
        ttft=distribution(s.ttft for s in ok),
        tpot=distribution(s.tpot for s in ok),
        itl=distribution(gap for s in ok for gap in s.gaps),
        largest_gap=distribution(s.largest_gap for s in ok),
        e2e=distribution(s.e2e for s in ok),
        schedule_delay=distribution(s.schedule_delay for s in ok),
        prompt_tokens=distribution((s.prompt_tokens for s in ok), scale=1.0),
        cached_tokens=sum(s.cached_tokens or 0 for s in ok),
        inter_chunk=events < 0.8 * tokens,
        health=health,
        fault=health.fault,
    )
