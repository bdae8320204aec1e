"""The line that a long command shows of itself."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from pathlib import Path
from types import ModuleType
from uuid import uuid4

import pytest


@pytest.mark.parametrize(
    ("line", "seconds", "expected"),
    [
        ("[120/224] Building CXX object ggml/src/x.o", 192, "[120/224] 53 % 3m12s"),
        ("[224/224] Linking", 9.9, "[224/224] 100 % 9s"),
        ("12 % of 94 MiB, 40.0 MiB/s", 3, "12 % of 94 MiB, 40.0 MiB/s 3s"),
        ("", 61, "1m01s"),
    ],
)
def test_a_line_says_how_far_and_how_long(progress: ModuleType, line: str, seconds: float, expected: str) -> None:
    assert progress.summary(line, seconds) == expected


def test_a_build_shows_its_steps_and_no_fragments_of_warnings(progress: ModuleType) -> None:
    shown = progress.newest("", ["[1/9] Building", "x.cpp:3:1: warning: unused", "  3 | int y;", "    | ^~~"])
    assert shown == "[1/9] Building"
    assert progress.newest(shown, ["    | ^~~", ""]) == "[1/9] Building"
    assert progress.newest(shown, ["[2/9] Linking"]) == "[2/9] Linking"
    assert progress.newest("12 % of 94 MiB", ["24 % of 94 MiB", ""]) == "24 % of 94 MiB"


def start(progress: ModuleType, log: Path, command: str, environment: str = "") -> None:
    quoted = shlex.quote(str(log))
    job = shlex.quote(progress._JOB.format(command=command, log=quoted))
    script = progress._START.format(
        directory=shlex.quote(str(log.parent)), chdir="/", environment=environment, log=quoted, job=job
    )
    subprocess.run(["sh", "-s"], input=script, text=True, check=True)


def state(progress: ModuleType, log: Path) -> str:
    script = progress._POLL.format(log=shlex.quote(str(log)), offset=1)
    told: str = subprocess.run(["sh", "-s"], input=script, capture_output=True, text=True, check=True).stdout
    return told


@pytest.mark.parametrize("name", ["x.log", "a folder's.log"])
def test_what_runs_is_followed_and_not_started_again(progress: ModuleType, tmp_path: Path, name: str) -> None:
    log = tmp_path / name
    start(
        progress, log, "echo first; while [ ! -e go ]; do sleep 0.05; done".replace("go", shlex.quote(f"{tmp_path}/go"))
    )
    start(progress, log, "echo second")
    while state(progress, log) == "running\n":
        time.sleep(0.05)
    assert state(progress, log) == "running\nfirst\n"
    (tmp_path / "go").touch()
    while state(progress, log).startswith("running"):
        time.sleep(0.05)
    assert state(progress, log) == "rc=0\nfirst\n"


def test_another_process_with_the_number_of_one_that_is_gone_is_not_waited_for(
    progress: ModuleType, tmp_path: Path
) -> None:
    log = tmp_path / "build.log"
    (tmp_path / "build.log.pid").write_text(f"{os.getpid()}\n")
    assert state(progress, log) == "rc=137\n"
    start(progress, log, "echo built")
    while not (tmp_path / "build.log.rc").exists():
        time.sleep(0.05)
    assert log.read_text() == "built\n"


def test_its_environment_is_not_for_everyone_to_read(progress: ModuleType, tmp_path: Path) -> None:
    log, secret = tmp_path / "fetch.log", uuid4().hex
    wait = f'echo "$TOKEN"; while [ ! -e {tmp_path}/go ]; do sleep 0.05; done'
    start(progress, log, wait, environment=f"TOKEN={secret}")
    while secret not in state(progress, log):
        time.sleep(0.05)
    seen = subprocess.run(["ps", "-wweo", "args"], capture_output=True, text=True, check=True).stdout
    (tmp_path / "go").touch()
    assert str(log) in seen
    assert secret not in seen


def test_the_fullest_file_system_is_named(progress: ModuleType) -> None:
    df = (
        "Filesystem 1024-blocks Used Available Capacity Mounted on\n"
        "/dev/vda1     10000000  100   9999900       1% /\n"
        "tmpfs           200000  200000      0     100% /srv/my models\n"
    )
    assert progress.fullest(df) == ("/srv/my models", 0)
    assert progress.fullest("") == ("", 0)
