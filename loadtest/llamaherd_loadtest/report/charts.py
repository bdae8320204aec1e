"""The report's charts: renders the verdict's table or the search's steps as SVG, empty if there is nothing to draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.ticker import MaxNLocator

from llamaherd_loadtest.quantiles import quantile
from llamaherd_loadtest.report import under_load
from llamaherd_loadtest.report.palette import PALETTE, STYLE, figure, in_ms, legend_above, to_svg
from llamaherd_loadtest.tune.search import Step
from llamaherd_loadtest.tune.settings import key
from llamaherd_loadtest.tune.verdict import Row, Verdict


def draw(verdict: Verdict, steps: Sequence[Step]) -> list[tuple[str, str]]:
    """Return all charts with their titles."""
    with mpl.rc_context(STYLE):
        return [
            ("Throughput against time to first token", _trade_off(verdict)),
            ("Latencies of the confirming windows", _latencies(verdict, steps)),
            ("Latency by load", under_load.latencies_by_load(verdict, steps)),
            ("Course of the search", _course(verdict, steps)),
            ("Stalls while confirming", under_load.stalls(verdict, steps)),
            ("Slots and KV cache", under_load.engine(verdict, steps)),
            ("Load generator", _client_health(steps)),
        ]


def _trade_off(verdict: Verdict) -> str:
    """Throughput against TTFT p95, one point per setting, with the limit."""
    rows = [r for r in verdict.table if r.output_tokens_per_s is not None and r.ttft_p95_ms is not None]
    if not rows:
        return ""
    drawn, (axes,) = figure()
    seen: set[str] = set()
    numbers = _numbers(verdict)
    for row in rows:
        role = _role(row, verdict)
        _name(axes, row.ttft_p95_ms or 0.0, row.output_tokens_per_s or 0.0, numbers[key(row.settings)])
        axes.scatter(row.ttft_p95_ms, row.output_tokens_per_s, label=None if role in seen else role, **_MARKS[role])
        seen.add(role)
    limit = verdict.limits.get("ttft_p95")
    if limit is not None:
        axes.axvline(limit, color=PALETTE["miss"], linestyle="--", label=f"limit {limit:.0f} ms")
    in_ms(axes, "x", "TTFT p95", [*(row.ttft_p95_ms for row in rows if row.ttft_p95_ms), *([limit] if limit else [])])
    axes.set(ylabel="output tokens/s", ylim=(0, None))
    legend_above(axes, 3)
    return to_svg(drawn, "Output tokens per second against time to first token, a point for each setting")


def _latencies(verdict: Verdict, steps: Sequence[Step]) -> str:
    """Distributions of TTFT and TPOT over the confirming windows: the current settings and the best others."""
    confirmed = [step for step in steps if step.phase == "confirm" and not step.measurement.fault]
    if not confirmed:
        return ""
    others = [r.settings for r in verdict.table if r.confirmed and r.settings != verdict.current]
    other = verdict.chosen if verdict.chosen in others else next(iter(others), None)
    lines = [(verdict.current, "current")]
    if other is not None:
        lines.append((other, "chosen" if other == verdict.chosen else "other"))
    drawn, panels = figure(panels=2, height=2.4)
    for axes, metric in zip(panels, ("ttft", "tpot"), strict=True):
        shown: list[float] = []
        for settings, role in lines:
            values = [v for s in confirmed if s.settings == settings for v in getattr(s.measurement, f"{metric}_ms")]
            cumulative(axes, values, role, f"{role} ({len(values)})")
            shown += values
        limit = verdict.limits.get(f"{metric}_p95")
        if limit is not None:
            axes.plot([limit], [0.95], marker="v", color=PALETTE["miss"], linestyle="none", label="p95 limit")
            shown.append(limit)
        in_ms(axes, "x", metric.upper(), shown or [1.0])
        axes.set(ylabel="share of requests", ylim=(0, 1.02))
    legend_above(panels[0], 3)
    return to_svg(drawn, "Cumulative distributions of time to first token and time per output token")


def _course(verdict: Verdict, steps: Sequence[Step]) -> str:
    """The course of the search: the throughput of each window in order, with faults at the bottom."""
    if not steps:
        return ""
    drawn, (axes,) = figure()
    groups = {
        "screened": [s for s in steps if s.phase == "screen"],
        "confirmed": [s for s in steps if s.phase == "confirm" and s.settings != verdict.current],
        "current": [s for s in steps if s.settings == verdict.current],
    }
    for role, group in groups.items():
        good = [s for s in group if not s.measurement.fault]
        axes.scatter([s.number for s in good], [s.measurement.tokens_per_s for s in good], label=role, **_MARKS[role])
    numbers = _numbers(verdict)
    for step in steps:
        if not step.measurement.fault and key(step.settings) in numbers and step.phase in ("screen", "confirm"):
            _name(axes, step.number, step.measurement.tokens_per_s, numbers[key(step.settings)])
    faults = [s.number for s in steps if s.measurement.fault]
    if faults:
        axes.scatter(faults, [0] * len(faults), label="fault", **_MARKS["fault"])
    axes.set(xlabel="window", ylabel="output tokens/s", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_above(axes, 4)
    return to_svg(drawn, "Throughput of each measured window in the order of the search")


def _client_health(steps: Sequence[Step]) -> str:
    """CPU use and timer lag of the load generator in each window."""
    good = [s for s in steps if not s.measurement.fault]
    if not good:
        return ""
    drawn, (cpu, lag) = figure(panels=2, height=1.6)
    numbers = [s.number for s in good]
    cpu.plot(numbers, [100 * s.measurement.client_cpu for s in good], color=PALETTE["chosen"], marker=".")
    cpu.set(ylabel="CPU, % of a core", ylim=(0, 100))
    lag.plot(numbers, [s.measurement.client_lag_ms for s in good], color=PALETTE["chosen"], marker=".")
    for axes in (cpu, lag):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    lag.set(xlabel="window", ylabel="timer lag p95, ms", ylim=(0, None))
    return to_svg(drawn, "CPU use and timer lag of the load generator in each window")


_MARKS: dict[str, dict[str, Any]] = {
    "chosen": {"marker": "*", "s": 160, "color": PALETTE["chosen"], "zorder": 3, "clip_on": False},
    "confirmed": {"marker": "*", "s": 90, "color": PALETTE["chosen"], "zorder": 3, "clip_on": False},
    "current": {"marker": "s", "s": 50, "color": PALETTE["current"], "zorder": 3, "clip_on": False},
    "passes": {"marker": "o", "s": 36, "color": PALETTE["muted"], "clip_on": False},
    "unresolved": {"marker": "o", "s": 36, "facecolor": "none", "edgecolor": PALETTE["muted"], "clip_on": False},
    "misses a limit": {"marker": "x", "s": 36, "color": PALETTE["miss"], "clip_on": False},
    "screened": {"marker": "o", "s": 30, "color": PALETTE["muted"], "clip_on": False},
    "fault": {"marker": "x", "s": 36, "color": PALETTE["miss"], "clip_on": False},
}


def _numbers(verdict: Verdict) -> dict[str, int]:
    """Return the numbers that the page's table gives the settings."""
    return {key(row.settings): number for number, row in enumerate(verdict.table, start=1)}


def _name(axes: Any, x: float, y: float, number: int) -> None:
    axes.annotate(str(number), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8, color=PALETTE["muted"])


def _role(row: Row, verdict: Verdict) -> str:
    if row.settings == verdict.current:
        return "current"
    if row.settings == verdict.chosen:
        return "chosen"
    return {"passes": "passes", "unresolved": "unresolved"}.get(row.verdict.split()[0], "misses a limit")


def cumulative(axes: Any, values: Sequence[float], role: str, label: str) -> None:
    """Plot the cumulative distribution of `values`."""
    ordered = sorted(values)
    if ordered:
        shares = [i / 100 for i in range(101)]
        colour = PALETTE["current"] if role == "current" else PALETTE["chosen"]
        axes.plot([quantile(ordered, p) for p in shares], shares, color=colour, label=label)
