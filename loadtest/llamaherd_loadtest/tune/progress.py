"""The tuner's progress output: one line per window."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llamaherd_loadtest.quantiles import quantile
from llamaherd_loadtest.tune.search import Step
from llamaherd_loadtest.tune.settings import Settings, label
from llamaherd_loadtest.tune.space import knobs


def say(text: str) -> None:
    """Print one line and flush, since stdout may be a pipe."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Progress:
    """Prints each step: the settings, the result, the time left."""

    def __init__(self, launch: Sequence[Settings]) -> None:
        self._knobs = knobs(launch)
        self._width = max(len(label(s, self._knobs)) for s in launch)

    def show(self, step: Step) -> None:
        """Print one step."""
        name = label(step.settings, self._knobs).ljust(self._width)
        left = f"{int(step.left_s) // 60}:{int(step.left_s) % 60:02d} left"
        say(f"{step.number:3d} {step.phase:7} {name}  {_result(step)}  ({left})")


def _result(step: Step) -> str:
    m = step.measurement
    if m.fault:
        return m.fault
    ttft, tpot = (quantile(sorted(values), 0.95) if values else float("nan") for values in (m.ttft_ms, m.tpot_ms))
    errors = f", {m.errors} errors" if m.errors else ""
    return (
        f"{m.tokens_per_s:7.1f} tok/s  TTFT p95 {ttft:6.0f} ms  TPOT p95 {tpot:5.0f} ms  {m.requests} requests{errors}"
    )
