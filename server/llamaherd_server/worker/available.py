"""How much memory is left."""

from __future__ import annotations

import math
from pathlib import Path


def available_bytes() -> float | None:
    """Memory that this process may still take, by the host and its control groups; None where nobody tells (macOS)."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    lines = meminfo.read_text().splitlines()
    host = next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable:"))
    return min(host, _control_group_bytes())


def _control_group_bytes() -> float:
    """What the tightest control group (version 2) above this process leaves, file cache that can go included."""
    groups = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.removeprefix("0::") for line in groups if line.startswith("0::")), "/")
    left = math.inf
    root = Path("/sys/fs/cgroup")
    folder = root / own.strip("/")
    for group in (folder, *folder.parents):
        limit = group / "memory.max"
        if limit.exists() and (most := limit.read_text().strip()) != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
            left = min(left, int(most) - used)
        if group == root:
            break
    return left
