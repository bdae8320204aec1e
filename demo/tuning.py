"""The tuning stage, which has to end with measured settings however slow the machine is."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from demo.stages import ROOT, StageFailed, playbook

_LONGER = 4
_ATTEMPTS = 3


def tune(inventory: str, host: str, *arguments: str) -> None:
    """Tune for as long as BUDGET (`make demo BUDGET=10m`) or the inventory says; longer where that gives no choice."""
    budget = os.environ.get("BUDGET")
    folder = ROOT / "build/tune" / host
    for attempt in range(1, _ATTEMPTS + 1):
        (folder / "budget.json").unlink(missing_ok=True)
        try:
            within = ["-e", f"llamaherd_loadgen_budget={budget}"] if budget else []
            playbook(inventory, "tune.yml", *arguments, *within)
        except StageFailed:
            if attempt == _ATTEMPTS or not (folder / "budget.json").exists():
                raise
        if attempt == _ATTEMPTS or not (needed_s := longer_budget_s(folder)):
            return
        budget = f"{needed_s}s"
        print(f"\nThat budget gives no choice on this machine; tuning again with {needed_s} s.\n", flush=True)


def longer_budget_s(folder: Path) -> int:
    """What the tuner says that it needs, or several times the budget that measured nothing; 0 where it has measured."""
    if (folder / "budget.json").exists():
        needed_s: float = json.loads((folder / "budget.json").read_text())["needed_s"]
        return math.ceil(needed_s)
    if measured(folder):
        return 0
    budget_s: float = json.loads((folder / "verdict.json").read_text())["provenance"]["budget_s"]
    return math.ceil(_LONGER * budget_s)


def measured(folder: Path) -> bool:
    """Whether a tuning run measured at least one setting."""
    table = json.loads((folder / "verdict.json").read_text())["table"]
    return any(row.get("output_tokens_per_s") for row in table)
