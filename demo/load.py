"""What else runs on this machine: threads of the engine that share a core wait for each other, for seconds a token."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from statistics import mean

_SAMPLES, _EVERY_S = 20, 0.1
_STAT = Path("/proc/stat")


def engine_variables() -> list[str]:
    """Arguments for ansible-playbook that give the engine the cores which nothing else keeps busy, one at least."""
    cores = os.cpu_count() or 1
    threads = max(1, cores - round(busy_cores()))
    if threads == cores:
        return []
    print(
        f"other programs keep {cores - threads} of {cores} cores busy: the engine gets threads = {threads}", flush=True
    )
    return ["-e", json.dumps({"llamaherd_settings": {"threads": threads, "threads_batch": threads}})]


def busy_cores() -> float:
    """How many cores other processes keep busy, as the mean over two seconds."""
    if not _STAT.exists():
        return os.getloadavg()[0]
    running = []
    for _ in range(_SAMPLES):
        found = re.search(r"^procs_running (\d+)$", _STAT.read_text(), re.MULTILINE)
        running.append(int(found[1]) - 1 if found else 0)  # this process runs too
        time.sleep(_EVERY_S)
    return mean(running)
