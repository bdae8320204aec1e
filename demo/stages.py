"""Running one stage after the other with its time, and a playbook with its output shown as it comes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_ERROR = re.compile(r"^\[ERROR\]: (?:Task failed: )?(?:Action failed: |Module failed: )?(.+)$")


class StageFailed(Exception):
    """A stage did not reach its end; the message is the last error that it printed."""


@dataclass(frozen=True)
class Stage:
    title: str
    run: Callable[[], object]


class Timer:
    """Runs stages and keeps their times; the first one is what `make` did before Python started."""

    def __init__(self) -> None:
        started = float(os.environ.get("DEMO_STARTED", time.time()))
        self.stages: list[dict[str, str | float]] = [
            {"stage": "set up the environment", "seconds": round(time.time() - started, 1)}
        ]

    def run(self, stage: Stage) -> None:
        print(f"\n━━━ {stage.title} ━━━", flush=True)
        started = time.monotonic()
        try:
            stage.run()
        finally:
            seconds = round(time.monotonic() - started, 1)
            self.stages.append({"stage": stage.title, "seconds": seconds})
            print(f"━━━ {stage.title}: {seconds:.0f} s ━━━", flush=True)


def playbook(inventory: str, name: str, *arguments: str) -> None:
    """Run playbooks/`name`; raises StageFailed with the last error it showed."""
    command = [
        str(Path(sys.executable).with_name("ansible-playbook")),
        *("-i", inventory, f"playbooks/{name}"),
        *arguments,
    ]
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    if sys.stdout.isatty():
        env["ANSIBLE_FORCE_COLOR"] = "1"
    error = ""
    with subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as child:
        for line in child.stdout or ():
            sys.stdout.write(line)
            sys.stdout.flush()
            found = _ERROR.match(re.sub(r"\x1b\[[0-9;]*m", "", line))
            error = found.group(1).strip().rstrip(".") if found else error
    if child.returncode != 0:
        raise StageFailed(error or f"playbooks/{name} ended with exit code {child.returncode}")


def forget_tuning(inventory: str, host: str) -> None:
    """For a search from the defaults on that resumes no earlier one."""
    (ROOT / inventory / "host_vars" / host / "tuned.yml").unlink(missing_ok=True)
    shutil.rmtree(ROOT / "build/tune" / host, ignore_errors=True)
