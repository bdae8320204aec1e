"""Charts of a server under load: latencies by load, and stalls, slots and KV cache over time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator

from llamaherd_loadtest.quantiles import estimate
from llamaherd_loadtest.report.palette import PALETTE, figure, in_ms, legend_above, to_svg
from llamaherd_loadtest.tune.evidence import Measurement
from llamaherd_loadtest.tune.search import Step
from llamaherd_loadtest.tune.settings import Settings, key, label
from llamaherd_loadtest.tune.space import knobs
from llamaherd_loadtest.tune.verdict import Verdict

Loads = dict[int, list[Measurement]]


def latencies_by_load(verdict: Verdict, steps: Sequence[Step]) -> str:
    """TTFT and TPOT p95 by requests in flight, with 95 % intervals.

    For the chosen settings if their capacity was measured, otherwise one line per group of settings that differ only in
    their slots.
    """
    lines = _lines(verdict, steps)
    if not lines:
        return ""
    drawn, panels = figure(panels=2, height=2.2)
    for axes, metric in zip(panels, ("ttft", "tpot"), strict=True):
        shown = [value for name, role, loads in lines for value in _line(axes, metric, name, role, loads)]
        if (limit := verdict.limits.get(f"{metric}_p95")) is not None:
            axes.axhline(limit, color=PALETTE["miss"], linestyle="--", label=f"limit {limit:.0f} ms")
            shown.append(limit)
        in_ms(axes, "y", f"{metric.upper()} p95", shown or [1.0])
        axes.set_xscale("log", base=2)
        ticks = [2**i for i in range(max(load for *_, loads in lines for load in loads).bit_length())]
        axes.set_xticks(ticks, [str(load) for load in ticks])
        axes.minorticks_off()
    legend_above(panels[0], 1)
    panels[-1].set_xlabel("requests in flight; hollow: unresolved")
    return to_svg(drawn, "Time to first token and time per output token at p95 by requests in flight, a line a setting")


def _lines(verdict: Verdict, steps: Sequence[Step]) -> list[tuple[str, str, Loads]]:
    """Return each line's name, colour and windows by load; at most two besides the current and the chosen settings."""
    climb = [s for s in steps if s.phase == "load"]
    groups: dict[str, Loads] = defaultdict(lambda: defaultdict(list))
    of: dict[str, Settings] = {}
    for step in climb or [s for s in steps if s.phase != "arrivals"]:
        if not step.measurement.fault:
            rest = {k: v for k, v in step.settings.items() if k != "parallel"}
            load = step.measurement.concurrency or int(step.settings["parallel"])
            groups[key(rest)][load].append(step.measurement)
            of[key(rest)] = rest
    named = knobs([row.settings for row in verdict.table])
    roles = {key({k: v for k, v in verdict.current.items() if k != "parallel"}): "current"}
    roles |= {key({k: v for k, v in verdict.chosen.items() if k != "parallel"}): "chosen"}
    lines = [
        (label(of[group], named), roles.get(group, "muted"), loads) for group, loads in groups.items() if len(loads) > 1
    ]
    lines.sort(key=lambda line: (line[1] == "muted", -len(line[2])))
    return lines[: len(set(roles.values())) + 2]


def _line(axes: Any, metric: str, name: str, role: str, loads: Loads) -> list[float]:
    pooled = {load: sorted(v for m in loads[load] for v in getattr(m, f"{metric}_ms")) for load in sorted(loads)}
    points = [(load, estimate(values, 0.95)) for load, values in pooled.items() if values]
    colour = PALETTE[role]
    axes.plot([load for load, _ in points], [q.value for _, q in points], color=colour, zorder=2, label=name)
    sure = [(load, q.value, q.low, q.high) for load, q in points if q.low is not None and q.high is not None]
    unsure = [(load, q.value) for load, q in points if not q.resolved]
    if sure:
        x, y, low, high = zip(*sure, strict=True)
        ends = [[v - w for v, w in zip(y, low, strict=True)], [w - v for v, w in zip(y, high, strict=True)]]
        axes.errorbar(x, y, ends, fmt="o", capsize=4, color=colour)
    if unsure:
        axes.scatter(*zip(*unsure, strict=True), marker="o", facecolor="none", edgecolor=colour)
    return [v for _, q in points for v in (q.low, q.value, q.high) if v]


def stalls(verdict: Verdict, steps: Sequence[Step]) -> str:
    """The largest gap of each request over the time of the confirming windows, one after another."""
    drawn, (axes,) = figure()
    lines = [(verdict.current, "current")]
    if verdict.chosen != verdict.current:
        lines.append((verdict.chosen, "chosen"))
    for settings, role in lines:
        points = _one_after_another(steps, settings)
        if points:
            axes.scatter(*zip(*points, strict=True), s=14, color=PALETTE[role], label=role, clip_on=False)
    if not axes.collections:
        return ""
    if (limit := verdict.limits.get("gap_max")) is not None:
        axes.axhline(limit, color=PALETTE["miss"], linestyle="--", label=f"limit {limit:.0f} ms")
    axes.set(xlabel="seconds under load", ylabel="largest gap of a request, ms", xlim=(0, None), ylim=(0, None))
    legend_above(axes, 3)
    return to_svg(drawn, "The largest gap between tokens of each request over time")


def engine(verdict: Verdict, steps: Sequence[Step]) -> str:
    """Busy slots and the used share of the KV cache over the windows of the chosen settings."""
    seen: list[tuple[float, int, float]] = []
    offset = 0.0
    for step in steps:
        if step.settings == verdict.chosen and step.measurement.engine:
            window = step.measurement.engine
            seen += [(offset + s.at_s, s.slots_busy, 100 * s.kv_used / max(s.kv_cells, 1)) for s in window]
            offset = seen[-1][0]
    if not seen:
        return ""
    drawn, (slots, kv) = figure(panels=2, height=1.8)
    times, busy, used = zip(*seen, strict=True)
    slots.plot(times, busy, color=PALETTE["chosen"], drawstyle="steps-post")
    slots.set(ylabel="slots busy", ylim=(0, int(verdict.chosen["parallel"]) * 1.1))
    slots.yaxis.set_major_locator(MaxNLocator(integer=True))
    kv.plot(times, used, color=PALETTE["chosen"])
    kv.set(xlabel="seconds under load", ylabel="KV cache used, %", ylim=(0, None))
    return to_svg(drawn, "Slots with a request and KV cache in use over time")


def _one_after_another(steps: Sequence[Step], settings: Settings) -> list[tuple[float, float]]:
    points: list[tuple[float, float]] = []
    offset = 0.0
    for step in steps:
        if step.phase == "confirm" and step.settings == settings and step.measurement.stalls:
            points += [(offset + at, gap) for at, gap in step.measurement.stalls]
            offset = max(at for at, _ in points)
    return points
