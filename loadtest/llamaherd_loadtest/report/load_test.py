"""The report of one load test, from its files: what `playbooks/loadtest.yml` shows of a host as configured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import msgspec

from llamaherd_loadtest.limits import METRICS, Limit
from llamaherd_loadtest.quantiles import Judgement, Quantile
from llamaherd_loadtest.report.charts import cumulative
from llamaherd_loadtest.report.palette import PALETTE, STYLE, figure, in_ms, legend_above, to_svg
from llamaherd_loadtest.samples import CUT_OFF, OK, Sample, read_samples
from llamaherd_loadtest.summary import QUANTILES, Distribution, Summary, in_words

VERBS = {Judgement.PASSES: "kept", Judgement.MISSES: "missed", Judgement.UNRESOLVED: "unresolved"}
_P95 = QUANTILES.index(0.95)


def context(folder: Path, about: Mapping[str, str]) -> dict[str, object]:
    """Return load.html.j2's context from `summary.json` and `samples.jsonl`. Raises ValueError if unreadable."""
    try:
        summary = msgspec.json.decode((folder / "summary.json").read_bytes(), type=Summary)
        samples = [s for s in read_samples(folder / "samples.jsonl") if not s.warmup]
    except (OSError, msgspec.MsgspecError) as error:
        raise ValueError(f"{folder} does not hold a load test: {error}") from error
    named = (("TTFT", summary.ttft), ("TPOT", summary.tpot), ("ITL", summary.itl), ("E2E", summary.e2e))
    with mpl.rc_context(STYLE):
        charts = [("Latencies of all requests", _latencies(summary, samples)), ("Requests over time", _course(samples))]
    return {
        "title": f"Load test: {about.get('host', folder.name)}",
        "sentence": sentence(summary),
        "summary": summary,
        "words": in_words(summary)[:1],
        "about": dict(about),
        "charts": charts,
        "distributions": [*named, ("largest gap", summary.largest_gap), ("late sends", summary.schedule_delay)],
        "quantiles": QUANTILES,
        "verbs": VERBS,
    }


def sentence(summary: Summary) -> str:
    """Return the headline: what the host did, or why that is unknown."""
    if summary.fault:
        return f"This run is invalid: {summary.fault}."
    speed = f"{summary.output_tokens_per_s:.3g} output tokens/s"
    if summary.tpot is not None:
        speed += f", each stream {1000 / max(summary.tpot.quantiles[0].value, 1e-3):.3g}"
    figures = [speed, *(f"{n} p95 {_p95(d)}" for n, d in (("TTFT", summary.ttft), ("TPOT", summary.tpot)) if d)]
    worst = {j.judgement for j in summary.judged}
    if worst:
        verdict = next(v for v in (Judgement.MISSES, Judgement.UNRESOLVED, Judgement.PASSES) if v in worst)
        which = ", ".join(j.limit.name for j in summary.judged if j.judgement is verdict)
        figures.append("all limits kept" if verdict is Judgement.PASSES else f"limit {which} {VERBS[verdict]}")
    return "; ".join(figures) + "."


def _p95(values: Distribution) -> str:
    q: Quantile = values.quantiles[_P95]
    between = f"{q.low:.0f} to {q.high:.0f}" if q.low is not None and q.high is not None else "unresolved"
    return f"{q.value:.0f} ms ({between})"


def _latencies(summary: Summary, samples: Sequence[Sample]) -> str:
    limits: dict[str, Limit] = {judged.limit.metric: judged.limit for judged in summary.judged}
    drawn, panels = figure(panels=2, height=2.4)
    for axes, metric in zip(panels, METRICS[:2], strict=True):
        values = [1000 * v for s in samples if s.outcome == OK and (v := getattr(s, metric)) is not None]
        cumulative(axes, values, "chosen", f"{len(values)} requests")
        if (limit := limits.get(metric)) is not None:
            axes.plot([limit.ms], [limit.p], marker="v", color=PALETTE["miss"], linestyle="none", label="limit")
        in_ms(axes, "x", metric.upper(), [*(v for v in values if v > 0), *([limit.ms] if limit else [])] or [1.0])
        axes.set(ylabel="share of requests", ylim=(0, 1.02))
        legend_above(axes, 2)
    return to_svg(drawn, "Cumulative distributions of time to first token and time per output token")


def _course(samples: Sequence[Sample]) -> str:
    """Requests in flight, and those of them that wait for a first token, over the test."""
    start = min((s.scheduled for s in samples), default=0.0)
    drawn, (axes,) = figure()
    for label, role, until in (("in flight", "muted", False), ("waiting for first token", "chosen", True)):
        steps = sorted(
            step
            for s in samples
            for step in ((s.scheduled - start, 1), ((s.first if until and s.first is not None else s.end) - start, -1))
        )
        times, counts = [0.0], [0]
        for at, change in steps:
            times.append(at)
            counts.append(counts[-1] + change)
        axes.plot(times, counts, drawstyle="steps-post", color=PALETTE[role], label=label)
    ends = [s.end - start for s in samples if s.outcome not in (OK, CUT_OFF)]
    if ends:
        axes.scatter(ends, [0] * len(ends), marker="x", color=PALETTE["miss"], label="error", clip_on=False, zorder=3)
    axes.set(xlabel="seconds", ylabel="requests", ylim=(0, None), xlim=(0, None))
    legend_above(axes, 3)
    return to_svg(drawn, "Requests in flight and requests that wait for a first token over time")
