"""Running one stage after the other with its time, and a playbook with its output shown as it comes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

ROOT = Path(__file__).resolve().parent.parent
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_FAILURE = re.compile(r"^(?:fatal|failed): \[.*=> *$")
_LAST_LINES = 8


class StageFailed(Exception):
    """A stage did not reach its end; the message is the whole reason."""


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
    """Run playbooks/`name`; raises StageFailed with the last error that it printed."""
    command = [
        str(Path(sys.executable).with_name("ansible-playbook")),
        *("-i", inventory, f"playbooks/{name}"),
        *arguments,
    ]
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    if sys.stdout.isatty():
        env["ANSIBLE_FORCE_COLOR"] = "1"
    lines: list[str] = []
    with subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as child:
        try:
            for line in child.stdout or ():
                sys.stdout.write(line)
                sys.stdout.flush()
                lines.append(_COLOUR.sub("", line.rstrip("\n")))
        except KeyboardInterrupt:
            _end(child)
            raise
    if child.returncode != 0:
        raise StageFailed(reason(lines) or f"playbooks/{name} ended with exit code {child.returncode} and no output")


def _end(child: subprocess.Popen[str]) -> None:
    """End an interrupted playbook: Ctrl-C has reached it too, other signals have not."""
    with suppress(subprocess.TimeoutExpired):
        child.wait(3)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        if child.poll() is None:
            child.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                child.wait(10)


def reason(lines: list[str]) -> str:
    """Why a playbook failed, from its output: message and stderr of the last task that did, or else the last lines."""
    starts = [number for number, line in enumerate(lines) if _FAILURE.match(line)]
    if not starts:
        return "\n".join([line for line in lines if line.strip()][-_LAST_LINES:])
    block = "\n".join(takewhile(lambda line: line.startswith(" ") or not line.strip(), lines[starts[-1] + 1 :]))
    try:
        result = yaml.safe_load(block)
        message = str(result.get("msg", "")).strip()
        details = (result.get(key) for key in ("stderr", "module_stderr", "module_stdout"))
    except (yaml.YAMLError, AttributeError):
        return block.strip()
    detail = next((str(each).strip() for each in details if each and str(each).strip()), "")
    if detail and detail not in message:
        tasks = [line for line in lines[: starts[-1]] if line.startswith("TASK [")]
        task = tasks[-1].removeprefix("TASK [").rstrip(" *").removesuffix("]") if tasks else "a task"
        return f"{task}: {message}\n{detail}"
    return message or block.strip()


@contextmanager
def ssh_connections() -> Iterator[None]:
    """Ansible keeps its ssh connections for two minutes; these end with the block, and so does the tuner's tunnel."""
    with TemporaryDirectory(prefix="llamaherd-") as folder:
        os.environ["ANSIBLE_SSH_CONTROL_PATH_DIR"] = folder
        try:
            yield
        finally:
            for control in (*Path(folder).iterdir(), *ROOT.glob("build/tune/*/.tunnel")):
                end = ["ssh", "-O", "exit", "-o", f"ControlPath={control}", "herd1"]
                subprocess.run(end, capture_output=True, check=False)


def forget_tuning(inventory: str, host: str) -> None:
    """For a search from the defaults on that resumes no earlier one."""
    (ROOT / inventory / "host_vars" / host / "tuned.yml").unlink(missing_ok=True)
    shutil.rmtree(ROOT / "build/tune" / host, ignore_errors=True)
