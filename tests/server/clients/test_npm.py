"""Continue's command line and Claude Code, with the settings that docs/clients.md shows."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..conftest import Server, running

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(900)]

CLIENTS = Path.home() / ".cache/llamaherd/npm"
PAGE = Path(__file__).resolve().parents[3] / "docs/clients.md"
# Both bring a program's prompt and tools along: the whole context for one request.
ENGINE = {"parallel": 1, "ctx_per_slot": 8192, "threads": 2, "threads_batch": 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("npm"), engine=ENGINE, model={"name": "chat"}) as started:
        yield started


def program(package: str, path: str) -> str:
    """The package's program under node_modules, from the npm registry or from what an earlier run fetched."""
    modules = CLIENTS / "node_modules"
    if not list(modules.glob(path)):
        CLIENTS.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--prefix", str(CLIENTS), package], check=True)
    return str(next(modules.glob(path)))


def block(section: str, language: str) -> str:
    """The first block of the language in the page's section."""
    found = re.search(rf"^## {section}$.*?^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found
    return found.group(1)


def say(command: str, home: Path, server: Server) -> str:
    """What the shell command says, with as little of this machine as it can do with; fails the test when it fails."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "HERD": server.url, "KEY": "none"}
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=home,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_continue_answers(server: Server, tmp_path: Path) -> None:
    config = block("Continue", "yaml").replace("https://herd1", server.url).replace("the key", "none")
    (tmp_path / "config.yaml").write_text(re.sub(r" +requestOptions:\n.*\n", "", config))
    cn = program("@continuedev/cli@1.5.47", ".bin/cn")
    assert say(f"CONTINUE_TELEMETRY_ENABLED=0 {cn} --config config.yaml -p 'Say hello.'", tmp_path, server)


def test_claude_code_answers(server: Server, tmp_path: Path) -> None:
    settings = block("Claude Code", "sh").removesuffix("claude\n")
    # The program itself, whether npm lets the package's script link it or not.
    claude = program("@anthropic-ai/claude-code@2.1.197", "@anthropic-ai/claude-code-*/claude")
    # Its own prompt and tools alone are 17,000 tokens, more than the test's model was trained for.
    small = f"{claude} -p 'What is 2 + 2?' --tools '' --system-prompt 'Answer with one word.'"
    said = say(f"{settings}\nCLAUDE_CODE_MAX_OUTPUT_TOKENS=1024 {small}", tmp_path, server)
    assert said
    assert "API Error" not in said
