"""Merges what the processes of one run measured onto one clock."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import Struct

from llamaherd_loadtest.health import Health
from llamaherd_loadtest.limits import Limit
from llamaherd_loadtest.samples import Sample
from llamaherd_loadtest.summary import Summary, summarise


class Part(Struct, frozen=True, kw_only=True):
    """What one process measured. Times are of its own clock; `epoch` (time.time() - clock) relates it to others.

    [start, end] is its full-load window. `warmed` of its `users` had warmed up; both are 0 in an open loop, where
    `at_once` requests arrive together.
    """

    samples: list[Sample]
    epoch: float
    start: float
    end: float
    users: int
    warmed: int
    cpu: float
    lag_p95_s: float
    at_once: int = 0


class MergedRun(Struct, frozen=True):
    """A whole run: its samples, in order and on one clock, and its summary."""

    samples: list[Sample]
    summary: Summary


def merge(parts: Sequence[Part], missing: int, limits: Sequence[Limit]) -> MergedRun:
    """Merge the parts: the load was full while it was full in all of them.

    The health of the worst client process counts. If `missing` processes did not report, or the load was never full,
    the summary's `fault` says so.
    """
    epoch = parts[0].epoch
    shifted = [_shift(part, part.epoch - epoch) for part in parts]
    samples = sorted((s for part in shifted for s in part.samples), key=lambda s: (s.index, s.turn))
    start, end = max(part.start for part in shifted), min(part.end for part in shifted)
    users, warmed = sum(part.users for part in parts), sum(part.warmed for part in parts)
    fault = "" if samples else "no request was sent"
    fault = f"{missing} load generators did not report: their requests are missing" if missing else fault
    if warmed < users or end <= start:
        fault = f"the load was never full: {warmed} of {users} users had warmed up: measure for longer"
        start, end = min(part.start for part in shifted), max(part.end for part in shifted) + 1e-9
    in_flight = sum(max(0.0, min(s.end, end) - max(s.sent, start)) for s in samples) / (end - start)
    health = Health(
        cpu=max(part.cpu for part in parts),
        lag_p95_s=max(part.lag_p95_s for part in parts),
        concurrency=in_flight / users if users else 1.0,
    )
    summary = summarise(samples, start, end, health, limits, at_once=parts[0].at_once)
    return MergedRun(samples, msgspec.structs.replace(summary, fault=fault or summary.fault))


def _shift(part: Part, by: float) -> Part:
    for sample in part.samples:
        for name in ("scheduled", "sent", "first", "last", "end"):
            if (at := getattr(sample, name)) is not None:
                setattr(sample, name, at + by)
    return msgspec.structs.replace(part, start=part.start + by, end=part.end + by)
