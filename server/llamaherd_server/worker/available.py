"""Total and available memory of this process, in bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path


def total_bytes() -> float | None:
    """Memory that the host and the control groups allow this process in total; None without /proc (macOS)."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    host = int(meminfo.read_text().split("MemTotal:")[1].split()[0]) * 1024.0
    return min([host, *(float(limit) for _, limit in _limited_groups())])


def available_bytes() -> float | None:
    """Memory that the host and the control groups still allow this process to use; None without /proc (macOS)."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    lines = meminfo.read_text().splitlines()
    host = next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable:"))
    return min(host, _control_group_bytes())


def _control_group_bytes() -> float:
    """Bytes left in the tightest control group of this process; reclaimable file cache counts as available."""
    available = math.inf
    for group, limit in _limited_groups():
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
        available = min(available, limit - used)
    return available


def _limited_groups() -> Iterator[tuple[Path, int]]:
    """The control groups (version 2) that limit the memory of this process, with their limits in bytes."""
    groups = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.removeprefix("0::") for line in groups if line.startswith("0::")), "/")
    root = Path("/sys/fs/cgroup")
    folder = root / own.strip("/")
    for group in (folder, *folder.parents):
        limit = group / "memory.max"
        if limit.exists() and (most := limit.read_text().strip()) != "max":
            yield group, int(most)
        if group == root:
            return
