"""The verdict for people and playbooks: one sentence, the settings, and the table behind them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean

import msgspec
from msgspec import Struct, field

from llamaherd_loadtest.files import write_whole
from llamaherd_loadtest.quality.asking import KvTypes
from llamaherd_loadtest.quantiles import Judgement, estimate
from llamaherd_loadtest.tune.answers import KvAnswers
from llamaherd_loadtest.tune.decide import Choice
from llamaherd_loadtest.tune.evidence import SLOTS, Record
from llamaherd_loadtest.tune.objective import Objective
from llamaherd_loadtest.tune.search import Search
from llamaherd_loadtest.tune.settings import Settings, difference, key, label
from llamaherd_loadtest.tune.space import Pruned, knobs

SCHEMA = "llamaherd.verdict/1"


class Row(Struct, kw_only=True):
    """One setting. Latencies are milliseconds over all requests of its windows; `resolved`: enough for an interval.

    `score` is the objective's score, `predicted` the score expected before the first window; `stream_tokens_per_s` is
    the median speed of one answer.
    """

    label: str
    settings: Settings
    score: float = 0.0
    predicted: float | None = None
    output_tokens_per_s: float | None = None
    stream_tokens_per_s: float | None = None
    ttft_p95_ms: float | None = None
    tpot_p95_ms: float | None = None
    requests: int = 0
    errors: int = 0
    windows: int = 0
    resolved: bool = False
    confirmed: bool = False
    verdict: str


class KvRow(Struct, frozen=True):
    """How answers change with types of KV cells, in words; `verdict` says whether that keeps the limits on answers."""

    kv_types: KvTypes
    quality: str
    verdict: str

    @classmethod
    def of(cls, one: KvAnswers) -> KvRow:
        return cls(one.kv_types, str(one.quality), one.verdict)


class Verdict(Struct, kw_only=True):
    """The content of verdict.json. `partial`: the search was interrupted and nothing was chosen. `measured` is false if
    every window of the current settings was invalid, so that nothing was compared.

    `capacity` says in words what load the chosen settings carry; it is empty if there was no time to measure it.
    """

    schema: str = SCHEMA
    verdict: str
    sentence: str
    partial: bool = False
    measured: bool = True
    objective: str = "tokens"
    load: str = str(SLOTS)
    capacity: str = ""
    current: Settings
    chosen: Settings
    table: list[Row]
    limits: dict[str, float] = field(default_factory=dict)
    answer_limits: dict[str, float] = field(default_factory=dict)
    answers: list[KvRow] = field(default_factory=list)
    workload: dict[str, object] = field(default_factory=dict)
    provenance: dict[str, object] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, float]:
        """The measured figures of the chosen settings, in the table's units."""
        row = _row_of(self.table, self.chosen)
        measured = {name: getattr(row, name) for name in ("output_tokens_per_s", "ttft_p95_ms", "tpot_p95_ms")}
        return {name: round(value, 1) for name, value in measured.items() if value is not None}


def read_verdict(path: Path) -> Verdict:
    """Raises ValueError if `path` does not hold a verdict."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Verdict)
    except (OSError, msgspec.MsgspecError) as error:
        raise ValueError(f"{path} is not a readable verdict: {error}") from error


def write_verdict(path: Path, verdict: Verdict) -> None:
    """Write `verdict` as JSON. Raises OSError."""
    write_whole(path, msgspec.json.format(msgspec.json.encode(verdict), indent=2) + b"\n")


def make_verdict(search: Search, choice: Choice | None, pruned: Sequence[Pruned]) -> Verdict:
    """Summarise a search; `choice` is None if it was interrupted."""
    current = search.records[0].settings
    chosen = choice.record.settings if choice else current
    table = _table(search, chosen, pruned)
    return Verdict(
        verdict="change" if choice and choice.change else "keep",
        sentence=_sentence(choice, table, current, search.objective),
        partial=choice is None,
        measured=choice is not None and choice.measured,
        objective=search.objective.name,
        load=str(search.load),
        current=current,
        chosen=chosen,
        table=table,
    )


def _sentence(choice: Choice | None, table: Sequence[Row], current: Settings, objective: Objective) -> str:
    if choice is None:
        return f"Keep {label(current)}: the search was interrupted."
    if not choice.change:
        return f"Keep {label(current)}: {choice.reason}."
    gain = objective.in_words(choice.gain, choice.margin)
    before, after = (_row_of(table, settings) for settings in (current, choice.record.settings))
    streams = ""
    if before.stream_tokens_per_s and after.stream_tokens_per_s:
        streams = f", each stream {before.stream_tokens_per_s:.3g} → {after.stream_tokens_per_s:.3g} tokens/s"
    within = "within all limits" if after.resolved else f"within all limits as far as {after.requests} requests show"
    return f"Change {difference(current, choice.record.settings)}: {gain}{streams}, {within}; {choice.reason}."


def _row_of(table: Sequence[Row], settings: Settings) -> Row:
    return next((row for row in table if row.settings == settings), Row(label="", settings={}, verdict=""))


def _table(search: Search, chosen: Settings, pruned: Sequence[Pruned]) -> list[Row]:
    """Return rows for all measured settings (confirmed first, then by score), then those never launched."""
    named = knobs([r.settings for r in search.records])
    rows = [
        _row(search, i, record, chosen, named)
        for i, record in enumerate(search.records)
        if record.all_windows or record.ruled_out
    ]
    rows.sort(key=lambda row: (not row.confirmed, -row.score))
    return rows + [
        Row(label=label(p.settings, named), settings=p.settings, verdict=f"not launched: {p.why}") for p in pruned
    ]


def _row(search: Search, index: int, record: Record, chosen: Settings, named: tuple[str, ...]) -> Row:
    row = Row(label=label(record.settings, named), settings=record.settings, verdict="")
    if record.fault or not record.figures:
        row.verdict = record.fault or record.last_fault
        return row
    ttft = sorted(v for m in record.windows for v in m.ttft_ms)
    tpot = sorted(v for m in record.windows for v in m.tpot_ms)
    row.output_tokens_per_s = geometric_mean(max(m.tokens_per_s, 1e-9) for m in record.windows)
    row.score, row.predicted = math.exp(record.log_score()), record.predicted
    row.requests, row.errors = sum(m.requests for m in record.windows), sum(m.errors for m in record.windows)
    row.windows, row.confirmed = len(record.windows), record.confirmed
    if ttft:
        p95 = estimate(ttft, 0.95)
        row.ttft_p95_ms, row.resolved = p95.value, p95.resolved
    if tpot:
        row.tpot_p95_ms = estimate(tpot, 0.95).value
        row.stream_tokens_per_s = 1000 / max(estimate(tpot, 0.5).value, 1e-3)
    row.verdict = _row_verdict(search, index, record, chosen)
    return row


def _row_verdict(search: Search, index: int, record: Record, chosen: Settings) -> str:
    judgement, limit = search.judge(index)
    verdict = str(judgement) if judgement is Judgement.PASSES else f"{judgement} {limit}"
    if index == 0:
        return "current" if judgement is Judgement.PASSES else f"current, {verdict}"
    return "chosen" if key(record.settings) == key(chosen) else verdict
