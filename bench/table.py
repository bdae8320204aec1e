"""The format of all results: scenario → metric → {ours, <peer>: figure, ratio: {<peer>: ours / peer}}."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

BUILD = Path(__file__).resolve().parent.parent / "build/bench"
Rounds = dict[str, list[float]]  # product → a figure for each round, in order
Metric = dict[str, Any]
Result = dict[str, dict[str, Metric]]


def metric(rounds: Rounds) -> Metric:
    """Return the median of each product, and the median of the ratios of each round, in which drift cancels out."""
    figures: Metric = {name: round(median(values), 4) for name, values in rounds.items()}
    ours = rounds["ours"]
    figures["ratio"] = {
        name: round(median(mine / theirs for mine, theirs in zip(ours, values, strict=True) if theirs), 4)
        for name, values in rounds.items()
        if name != "ours" and any(values)
    }
    return figures


def write(group: str, result: Result) -> None:
    """Print the table and write build/bench/`group`.json."""
    BUILD.mkdir(parents=True, exist_ok=True)
    target = BUILD / f"{group}.json"
    target.write_text(json.dumps(result, indent=2) + "\n")
    for scenario, metrics in result.items():
        print(f"\n{scenario}")
        for name, figures in metrics.items():
            ratios = figures["ratio"]
            cells = [f"ours {figures['ours']:g}"]
            for peer, figure in figures.items():
                if peer not in ("ours", "ratio"):
                    cells.append(f"{peer} {figure:g}" + (f" (x{ratios[peer]:.2f})" if peer in ratios else ""))
            print(f"  {name:<22}" + "   ".join(cells))
    print(f"\n{target}")
