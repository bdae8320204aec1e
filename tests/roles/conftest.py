"""Hosts that exist only as recorded facts, and what the roles would write for them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
# ansible-playbook again and again in forks of one process: to import it takes longer than the play.
PLAYBOOK = """
import json, os, sys
from ansible.cli.playbook import PlaybookCLI
for line in sys.stdin:
    job = json.loads(line)
    if not (child := os.fork()):
        for number, path in enumerate([os.devnull, job["stdout"], job["stderr"]]):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        PlaybookCLI.cli_executor(["ansible-playbook", *job["arguments"]])  # ends the process
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

# What setup and host_facts tell of a host of each kind, as far as the roles read it.
HOSTS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text()) for path in sorted(Path(__file__).parent.glob("facts/*.json"))
}
# What hosts differ in by what an operator did, not by their kind: nothing of ours yet, and all that a build needs.
for _facts in HOSTS.values():
    _facts["llamaherd"] |= {"links": {}, "programs": ["cc", "c++", "bash", "tar", "cmake", "ninja"]}


@dataclass(frozen=True)
class Rendered:
    """The files that one host would get, and what the roles decided."""

    folder: Path
    state_dir: Path
    secrets_dir: Path

    def text(self, name: str) -> str:
        return (self.folder / name).read_text()

    @property
    def decided(self) -> dict[str, Any]:
        decided: dict[str, Any] = json.loads(self.text("rendered.json"))["decided"]
        return decided


Render = Callable[..., Rendered]


@cache
def forking() -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", PLAYBOOK], cwd=ROOT, stdin=pipe, stdout=pipe, text=True)


def play(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """ansible-playbook with these arguments; it leaves its output in `folder`."""
    stdout, stderr = folder / "stdout", folder / "stderr"
    process = forking()
    assert process.stdin
    assert process.stdout
    process.stdin.write(json.dumps({"arguments": arguments, "stdout": str(stdout), "stderr": str(stderr)}) + "\n")
    process.stdin.flush()
    code = int(process.stdout.readline())
    return subprocess.CompletedProcess(arguments, code, stdout.read_text(), stderr.read_text())


def run_roles(folder: Path, host: str, variables: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """The checks and the templates of the roles, for `host` of HOSTS with more `variables` in the inventory.

    `groups` among them: other groups than the one host in inference and edge.
    """
    out = folder / "out"
    for path in (out, folder / "state/models"):
        path.mkdir(parents=True, exist_ok=True)
    for name in ("smollm2-135m-instruct", *(one["name"] for one in variables.get("llamaherd_models", ()))):
        (folder / f"state/models/{name}.gguf").touch()
    variables = dict(variables)
    groups = {"inference": {"hosts": {host: None}}, "edge": {"hosts": {host: None}}} | variables.pop("groups", {})
    variables = {
        "facts": HOSTS[host],
        **variables,
        "ansible_python_interpreter": sys.executable,
        "out": str(out),
        "llamaherd_state_dir": str(folder / "state"),
        "llamaherd_config_dir": str(out),
        "llamaherd_secrets_dir": str(folder / "secrets"),
    }
    inventory = folder / "hosts.yml"
    inventory.write_text(yaml.safe_dump({"all": {"vars": variables}} | groups))
    run = play(folder, "-i", str(inventory), "tests/roles/render.yml", "--skip-tags", "unrun", "--limit", host)
    if run.returncode == 0:
        rendered = json.loads((out / "rendered.json").read_text())
        for name, text in (rendered["files"] | rendered["monitored"]).items():
            (out / name).write_text(f"{text.rstrip()}\n")
    return run


@pytest.fixture(scope="session")
def render(tmp_path_factory: pytest.TempPathFactory) -> Render:
    """render(host, **variables), each combination once a session."""
    done: dict[str, Rendered] = {}

    def once(host: str, **variables: Any) -> Rendered:
        key = json.dumps([host, variables], sort_keys=True)
        if key not in done:
            folder = tmp_path_factory.mktemp(host)
            run = run_roles(folder, host, variables)
            assert run.returncode == 0, run.stdout + run.stderr
            done[key] = Rendered(folder / "out", folder / "state", folder / "secrets")
        return done[key]

    return once


@pytest.fixture(params=HOSTS)
def rendered(request: pytest.FixtureRequest, render: Render) -> Rendered:
    return render(request.param)


@pytest.fixture
def debian(render: Render) -> Rendered:
    return render("debian12")
