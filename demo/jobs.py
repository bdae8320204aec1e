"""The background jobs of the action plugin `progress` on this machine, which outlive an interrupted playbook."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path


def end_jobs(folder: Path) -> None:
    """End each job whose log lies below `folder`, with all processes that it started."""
    table = _processes()
    for pid_file in folder.rglob("*.log.pid"):
        log = str(pid_file).removesuffix(".pid")
        with suppress(ValueError, OSError):
            pid = int(pid_file.read_text())
            # After a reboot the number may be another process's.
            if log in table.get(pid, (0, ""))[1]:
                for each in _tree(pid, table):
                    with suppress(ProcessLookupError, PermissionError):
                        os.kill(each, signal.SIGTERM)
                pid_file.unlink()


def _processes() -> dict[int, tuple[int, str]]:
    """The parent and the command line of each process."""
    listing = subprocess.run(
        ["ps", "-wwaxo", "pid=,ppid=,command="], capture_output=True, text=True, errors="replace", check=True
    ).stdout
    rows = (line.split(None, 2) for line in listing.splitlines())
    return {int(pid): (int(parent), " ".join(command)) for pid, parent, *command in rows}


def _tree(root: int, table: dict[int, tuple[int, str]]) -> list[int]:
    """A process and its descendants, parents first."""
    found = [root]
    for each in found:  # grows while it is walked
        found += [pid for pid, (parent, _) in table.items() if parent == each]
    return found
