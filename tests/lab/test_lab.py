"""The lab itself leaves nothing behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.lab.conftest import booted

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]
PID_FILE = Path("/run/llamaherd-lab/t1.pid")


def test_a_labs_end_ends_what_a_killed_host_left_running(tmp_path: Path) -> None:
    with booted(tmp_path, of="inventory"):
        os.kill(int(PID_FILE.read_text()), signal.SIGKILL)
        assert rooted_in("t1")
    assert rooted_in("t1") == []


def rooted_in(host: str) -> list[str]:
    """The processes whose root is the overlay of this lab host."""
    found = []
    for table in Path("/proc").glob("[0-9]*/mountinfo"):
        try:
            mounts = [line.split() for line in table.read_text().splitlines()]
        except OSError:
            continue
        if any(mount[4] == "/" and f"hosts/{host}/upper," in mount[-1] for mount in mounts):
            found.append(table.parent.name)
    return found
