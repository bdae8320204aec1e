"""What the documentation tells people to type does what it should: each command is run, or a rule says what runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.conftest import Server, running
from tests.unit.conftest import ROOT
from tests.unit.test_docs import BLOCK, PAGES

BIN = Path(sys.executable).parent
# The first rule that matches says how: by a test below, or `elsewhere`, by what it names, or why nothing can.
RULES: list[tuple[str, str]] = [
    (r"ansible-playbook ", "play"),
    (r"make( |$)", "make"),
    (r"curl ", "curl"),
    (r"python -m llamaherd_loadtest\.profile ", "elsewhere: tests/lab/test_capacity.py"),
    (r"python -m llamaherd_loadtest\.", "loadtest"),
    (r"(podman (build|run)|docker compose) .*cuda|nvidia-ctk ", "elsewhere: needs an NVIDIA card"),
    (r"podman ", "elsewhere: tests/lab/test_container.py"),
    (r"docker compose ", "elsewhere: tests/lab/test_container.py"),
    (r"cp containers/llamaherd.container |systemctl ", "elsewhere: needs Podman 4.4 under systemd"),
    (r"ansible-galaxy |python3 -m pip install -r .*/meta/requirements.txt", "elsewhere: tests/lab/test_collection.py"),
    (r"scripts/bootstrap$", "bootstrap"),
    (r"brew ", "elsewhere: needs a Mac"),
    (r"claude$|export (ANTHROPIC|CLAUDE_CODE)_", "elsewhere: tests/server/clients/test_npm.py"),
    (r"cat inventories/mine/.secrets/open_webui/", "elsewhere: tests/lab/test_open_webui.py"),
    (r"ssh -i inventories/lab/", "elsewhere: tests/lab/test_lab.py"),
    (
        r"export |mkdir -p inventories/|\. \.venv/bin/activate$|git clone |cd llamaherd$",
        "elsewhere: prepares the reader's shell",
    ),
]


def commands() -> Iterator[tuple[str, str]]:
    """Page and command, for each one of the fenced shell blocks; a line that ends in a backslash goes on."""
    for page in PAGES:
        for kind, text in BLOCK.findall(page.read_text()):
            for line in text.replace("\\\n", " ").splitlines() if kind == "sh" else ():
                for command in re.sub(r"\s+#.*$", "", line).split(" && "):
                    if command.strip():
                        yield page.stem, re.sub(r"\s+", " ", command).strip()


def rule(command: str) -> str:
    bare = re.sub(r"^([A-Z_]+=\S+ )+", "", command)
    return next((how for pattern, how in RULES if re.match(pattern, bare)), "")


def run_by(how: str) -> list[str]:
    return sorted({command for _, command in commands() if rule(command) == how})


def sh(command: str, folder: Path, **environment: str) -> str:
    """What the command says; fails the test when it fails."""
    path = f"{BIN}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", command],
        cwd=folder,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def herd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose model is named as the pages name theirs."""
    with running(tmp_path_factory.mktemp("documented"), model={"name": "chat"}) as started:
        yield started


def test_a_rule_covers_every_command() -> None:
    found = list(commands())
    assert len(found) > 40
    assert [f"{page}: {command}" for page, command in found if not rule(command)] == []


def test_every_rule_covers_something_that_is_there() -> None:
    used = {rule(command) for _, command in commands()}
    assert {how for _, how in RULES} <= used
    for how in used:
        path = how.removeprefix("elsewhere: ")
        assert " " in path or path == how or (ROOT / path).exists(), how


@pytest.mark.parametrize("command", run_by("play"))
def test_ansible_finds_tasks_for_it(command: str) -> None:
    command = re.sub(r"inventories/(mine|connected)\b", "inventories/example", command.replace(" -K ", " "))
    assert "TAGS:" in sh(f"{command} --list-tasks", ROOT)


@pytest.mark.parametrize("command", run_by("make"))
def test_make_knows_what_to_do(command: str) -> None:
    assert sh(command.replace("make", "make --dry-run", 1), ROOT)


@pytest.mark.parametrize("command", run_by("bootstrap"))
def test_bootstrap_makes_the_environment(command: str, tmp_path: Path) -> None:
    for name in ("scripts", "server", "loadtest"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "requirements.lock", tmp_path)
    sh(command, tmp_path)
    assert "core" in sh(".venv/bin/ansible-playbook --version", tmp_path)


@pytest.mark.parametrize("command", run_by("curl"))
def test_curl_is_answered(command: str, herd: Server, tmp_path: Path) -> None:
    # The certificates are the matter of tests/lab.
    command = re.sub(r"--cacert \S+", "--fail-with-body", command)
    command = re.sub(r"\$\(cat [^)]*\)", "$KEY", command)
    command = re.sub(r"https?://[\w.]+(:\d+)?", herd.url, command)
    assert json.loads(sh(command, tmp_path, HERD=herd.url, KEY="none", CA=""))["object"]


@pytest.mark.parametrize("command", run_by("loadtest"))
def test_the_load_tools_take_their_arguments(command: str, tmp_path: Path) -> None:
    [profile] = re.findall(r"`(\{\"parallel\".*\})`", (ROOT / "docs/scale.md").read_text())
    (tmp_path / "profile.json").write_text(profile)
    assert sh(command, tmp_path)


@pytest.mark.parametrize(
    "program", [text for kind, text in BLOCK.findall((ROOT / "docs/clients.md").read_text()) if kind == "python"]
)
def test_a_clients_program_prints_an_answer(program: str, herd: Server, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(program)
    assert sh("python program.py", tmp_path, HERD=herd.url, KEY="none").strip()
