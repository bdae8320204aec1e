"""Summarises a run's samples. Only the full-load window counts; see `summarise`.

`python -m llamaherd_loadtest.summary` prints the JSON schema of a summary, the content of summary.schema.json.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from inspect import cleandoc

import msgspec
from msgspec import Struct

from llamaherd_loadtest.health import MIN_CONCURRENCY, Health, max_lag_s
from llamaherd_loadtest.limits import Judged, Limit, judge, judge_errors, meets, missed_already
from llamaherd_loadtest.quantiles import Judgement, Quantile, Share, estimate, share
from llamaherd_loadtest.samples import CLIENT, CUT_OFF, OK, Sample

SCHEMA = "llamaherd.summary/2"
_QUEUE_GROWTH = 2.0  # growth of a queue, in standard deviations, that chance does not explain
_STUCK_FACTOR, _STUCK_S = 3, 2.0  # stuck: silent for over 3 times its longest silence before, and over 2 s
QUANTILES = (0.5, 0.9, 0.95, 0.99)


class Distribution(Struct, frozen=True):
    """Quantiles in milliseconds over `count` values."""

    count: int
    mean: float
    max: float
    quantiles: list[Quantile]


class Goodput(Struct, frozen=True):
    """Requests that kept all limits. Errors are misses, and so are requests in flight at the end of the window that
    were past a limit by then; all other requests in flight count in neither figure.

    `attainment` is the share of requests that kept them, between 0 and 1; `low` to `high` is its 95 % interval.
    """

    limits: list[Limit]
    requests_per_s: float
    attainment: float
    low: float
    high: float


class Summary(Struct, frozen=True, kw_only=True):
    """One run. Rates are per second of the window, latencies in milliseconds.

    `inter_chunk` is set if events carry more than one token on average (events / tokens < 0.8): `itl` then holds gaps
    between chunks, not tokens. `prefill` and `queue` split the TTFT if the server reports its prefill time;
    `queue_share` is the queue's part of all TTFT. A quantile without `low` and `high` is unresolved: too few values for
    a 95 % interval. `error_share` is the share of failed requests among all that ended. `waited_s` is the longest time
    that a request in flight at the end had waited for its first token. `judged` holds each limit's own judgement,
    without errors. `fault` says why the run is invalid and names the exhausted resource; it is empty for a valid run.
    """

    schema: str = SCHEMA
    window_s: float
    requests: int
    errors: dict[str, int]
    error_share: Share | None
    cut_off: int
    waited_s: float
    output_tokens_per_s: float
    requests_per_s: float
    ttft: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    largest_gap: Distribution | None
    e2e: Distribution | None
    schedule_delay: Distribution | None
    prefill: Distribution | None
    queue: Distribution | None
    queue_share: float | None
    goodput: Goodput | None
    judged: list[Judged]
    prompt_tokens: Distribution | None
    output_tokens: Distribution | None
    cached_tokens: int
    inter_chunk: bool
    health: Health
    fault: str

    @property
    def cached_share(self) -> float:
        """Share of the prompt tokens that came from the server's cache."""
        tokens = self.prompt_tokens
        return self.cached_tokens / (tokens.mean * tokens.count) if tokens else 0.0


def counted(samples: Iterable[Sample], start: float, end: float) -> list[Sample]:
    """Return the requests that figures may use: no warm-ups, ended within the window, not cut off."""
    return [s for s in samples if not s.warmup and s.outcome != CUT_OFF and start <= s.end <= end]


def distribution(values: Iterable[float | None], scale: float = 1000.0) -> Distribution | None:
    """Summarise values (in seconds, unless `scale` differs) without the None; None if no value is left."""
    ordered = sorted(v * scale for v in values if v is not None)
    if not ordered:
        return None
    return Distribution(
        len(ordered), sum(ordered) / len(ordered), ordered[-1], [estimate(ordered, p) for p in QUANTILES]
    )


def summarise(
    samples: Sequence[Sample],
    start: float,
    end: float,
    health: Health,
    limits: Sequence[Limit] = (),
    *,
    at_once: int = 0,
) -> Summary:
    """Summarise the window [start, end] of the client's clock.

    Tokens count by arrival time, including those of requests that began before the window or were cut off after it: the
    server generated them in the window. Latencies are of requests that ended in it. `at_once` is the number of requests
    that arrive together in an open loop, 0 in a closed one.
    """
    inside = counted(samples, start, end)
    ok = [s for s in inside if s.outcome == OK]
    events, tokens = sum(s.events for s in ok), sum(s.tokens for s in ok)
    window = end - start
    delay = distribution(s.schedule_delay for s in ok)
    ttft, itl = distribution(s.ttft for s in ok), distribution(gap for s in ok for gap in s.gaps)
    timed = [(s.queue, s.prefill) for s in ok if s.queue is not None and s.prefill is not None]
    queued, waited = sum(queue for queue, _ in timed), sum(queue + prefill for queue, prefill in timed)
    waiting = [s for s in samples if not s.warmup and s.sent < end and (s.outcome == CUT_OFF or s.end > end)]
    failed = Counter(s.outcome for s in inside if s.outcome != OK)
    return Summary(
        window_s=window,
        requests=len(ok),
        errors=dict(failed),
        error_share=share(failed.total(), len(inside)),
        cut_off=sum(s.outcome == CUT_OFF or s.sent < end < s.end for s in samples),
        waited_s=max((end - s.scheduled for s in waiting if _waits(s, end)), default=0.0),
        output_tokens_per_s=sum(s.tokens_between(start, end) for s in samples) / window,
        requests_per_s=len(ok) / window,
        ttft=ttft,
        tpot=distribution(s.tpot for s in ok),
        itl=itl,
        largest_gap=distribution(s.largest_gap for s in ok),
        e2e=distribution(s.e2e for s in ok),
        schedule_delay=delay,
        prefill=distribution(s.prefill for s in ok),
        queue=distribution(s.queue for s in ok),
        queue_share=queued / waited if waited else None,
        goodput=_goodput(limits, inside, waiting, start, end),
        judged=[judge(limit, inside, waiting, end) for limit in limits],
        prompt_tokens=distribution((s.prompt_tokens for s in ok), scale=1.0),
        output_tokens=distribution((s.tokens for s in ok), scale=1.0),
        cached_tokens=sum(s.cached_tokens or 0 for s in ok),
        inter_chunk=events < 0.8 * tokens,
        health=health,
        fault=_out_of_sockets(samples)
        or _failures(inside, health)
        or health.fault(_median(ttft), _median(itl))
        or _late(delay, _median(ttft))
        or _unanswered(samples, inside, start, end)
        or (_over_saturated(samples, start, end, at_once) if at_once else ""),
    )


def _goodput(
    limits: Sequence[Limit], inside: Sequence[Sample], waiting: Sequence[Sample], start: float, end: float
) -> Goodput | None:
    late = sum(any(missed_already(limit, s, end) for limit in limits) for s in waiting)
    good = sum(meets(limits, s) for s in inside)
    kept = share(good, len(inside) + late)
    if not limits or kept is None:
        return None
    return Goodput(list(limits), good / (end - start), kept.value, kept.low, kept.high)


def _waits(sample: Sample, at: float) -> bool:
    """Return whether a sent request waits for its first token at time `at`."""
    return sample.first is None or sample.first > at


def _over_saturated(samples: Sequence[Sample], start: float, end: float, at_once: int) -> str:
    """Return a fault if requests arrive faster than the server answers: if in the second half of the arrivals the
    number of requests waiting for a first token grew by more than chance explains on a server that just keeps up."""
    arrivals = [s.scheduled for s in samples if not s.warmup and s.turn == 0 and start <= s.scheduled <= end]
    last = max(arrivals, default=start)
    middle = (start + last) / 2
    before, after = (
        sum(s.scheduled <= at < (s.end if s.outcome != CUT_OFF else end + 1) and _waits(s, at) for s in samples)
        for at in (middle, last)
    )
    lately = sum(at > middle for at in arrivals)
    if after - before <= _QUEUE_GROWTH * math.sqrt(lately * (1 + at_once)):
        return ""
    return (
        f"over-saturated: {after} requests waited for their first token when the last one arrived, {before} at "
        "half time: they arrive faster than the server answers"
    )


def _late(delay: Distribution | None, ttft_s: float) -> str:
    p95 = 0.0 if delay is None else delay.quantiles[QUANTILES.index(0.95)].value
    limit = max_lag_s(ttft_s) * 1000
    return f"event loop: requests were sent {p95:.0f} ms late at p95 (limit {limit:.0f})" if p95 > limit else ""


def _median(values: Distribution | None) -> float:
    return 0.0 if values is None else values.quantiles[QUANTILES.index(0.5)].value / 1000


def _failures(inside: Sequence[Sample], health: Health) -> str:
    """Return a fault if more requests failed than chance explains, or if failures left the load too low."""
    failed = Counter(f"{s.outcome}: {s.detail}".rstrip(": ") for s in inside if s.outcome != OK)
    short = failed and health.concurrency < MIN_CONCURRENCY
    if not short and judge_errors(failed.total(), len(inside)) is not Judgement.MISSES:
        return ""
    return f"{failed.total()} of {len(inside)} requests failed, most with {failed.most_common(1)[0][0]}"


def _unanswered(samples: Sequence[Sample], inside: Sequence[Sample], start: float, end: float) -> str:
    """Return a fault if no request ended in the window, or if the server stopped answering before its end."""
    if not samples:
        return ""
    waiting = sum(s.sent < end and (s.outcome == CUT_OFF or s.end > end) for s in samples)
    if not inside:
        return (
            f"no request ended within the window of {end - start:.1f} s, {waiting} were in flight: measure for longer"
        )
    heard = max((at for s in samples for at in (s.first, s.last, _ended(s)) if at is not None and at <= end), default=0)
    silences = (max([(s.end if s.first is None else s.first) - s.sent, *s.gaps]) for s in inside)
    if waiting and end - heard > max(_STUCK_FACTOR * max(silences), _STUCK_S):
        return f"the server stopped answering: nothing arrived in the last {end - heard:.1f} s, {waiting} in flight"
    return ""


def _ended(sample: Sample) -> float | None:
    return None if sample.outcome == CUT_OFF else sample.end


def _out_of_sockets(samples: Iterable[Sample]) -> str:
    detail = next((s.detail for s in samples if s.outcome == CLIENT), "")
    return f"sockets: {detail}: raise `ulimit -n` or use more load generators" if detail else ""


def in_words(summary: Summary) -> list[str]:
    """Return a few lines for a log."""
    errors = ", ".join(f"{count} {kind}" for kind, count in summary.errors.items()) or "no errors"
    lines = [
        f"{summary.window_s:.1f} s measured: {summary.requests} requests, {errors}, {summary.cut_off} cut off, "
        f"{summary.output_tokens_per_s:.1f} tokens/s"
    ]
    if summary.errors and summary.error_share:
        lines.append(f"{_share_in_words(summary.error_share)} of the requests failed")
    if summary.waited_s > 1:
        lines.append(f"at the end a request had waited {summary.waited_s:.1f} s for its first token")
    itl = "gap between chunks" if summary.inter_chunk else "ITL"
    for name, values in (("TTFT", summary.ttft), ("TPOT", summary.tpot), (itl, summary.itl), ("E2E", summary.e2e)):
        if values is not None:
            lines.append(f"{name} ms: " + "  ".join(map(_in_words, values.quantiles)) + f"  max {values.max:.0f}")
    if summary.queue_share is not None:
        lines.append(f"{summary.queue_share:.0%} of the TTFT was waiting, the rest prefill")
    if summary.cached_share:
        lines.append(f"{summary.cached_share:.0%} of the prompt tokens came from the server's cache")
    for judged in summary.judged:
        verb = {"passes": "kept", "misses": "missed", "unresolved": "unresolved"}[judged.judgement]
        lines.append(f"limit {judged.limit.name} {judged.limit.ms:g} ms: {verb}, {judged.over} of {judged.of} above it")
    if summary.goodput is not None:
        kept = _share_in_words(Share(summary.goodput.attainment, summary.goodput.low, summary.goodput.high))
        lines.append(f"goodput {summary.goodput.requests_per_s:.2f} requests/s: {kept} of the requests kept all limits")
    return lines


def _share_in_words(part: Share) -> str:
    return f"{part.value:.1%} ({part.low:.1%} to {part.high:.1%})"


def _in_words(quantile: Quantile) -> str:
    between = f"{quantile.low:.0f} to {quantile.high:.0f}" if quantile.low is not None else "unresolved"
    return f"p{quantile.p * 100:g} {quantile.value:.0f} ({between})"


def json_schema() -> bytes:
    """Return the JSON schema of a summary file."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": SCHEMA,
        **msgspec.json.schema(Summary),
    }
    for one in schema["$defs"].values():  # Python 3.13 removes the indentation itself
        if "description" in one:
            one["description"] = cleandoc(one["description"])
    return msgspec.json.format(msgspec.json.encode(schema)) + b"\n"


if __name__ == "__main__":
    sys.stdout.buffer.write(json_schema())
