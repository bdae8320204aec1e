"""What the documentation tells people to type is there, and the inventories that it shows pass the plays' own check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from scripts.docs_pages import metrics
from tests.unit.conftest import ROOT

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")] + sorted(ROOT.glob("docs/*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# A line ends where no backslash says that it goes on.
PLAY = re.compile(r"ansible-playbook((?:\\\n|[^\n`|#&])*)")
BIN = Path(sys.executable).parent


def blocks(language: str) -> list[Any]:
    """Every fenced block of the language, as pytest parameters named by page and number."""
    found = ((page, text) for page in PAGES for kind, text in BLOCK.findall(page.read_text()) if kind == language)
    return [pytest.param(text, id=f"{page.stem}-{number}") for number, (page, text) in enumerate(found)]


def mentioned(pattern: str) -> set[str]:
    """What the pattern's group matches in the code of all pages, fenced or between backticks."""
    code = "\n".join(
        part for page in PAGES for part in re.findall(r"^```.*?^```|`[^`\n]+`", page.read_text(), re.M | re.S)
    )
    return set(re.findall(pattern, code))


def variables(node: Any) -> Iterator[tuple[str, Any]]:
    """Every llamaherd_* variable at any depth of an inventory."""
    if isinstance(node, dict):
        for name, value in node.items():
            if str(name).startswith("llamaherd_"):
                yield name, value
            else:
                yield from variables(value)


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = mentioned(r"\bmake ([a-z-]+)\b")
    assert {"demo", "test"} <= named
    assert named - targets == set()


def test_every_file_exists() -> None:
    folders = "playbooks|roles|scripts|containers|docs|tests|templates|loadtest|server|inventories"
    named = mentioned(rf"(?<![\w/.~-])((?:{folders})/[\w./-]*\w)")
    # By the reader, or by a play.
    made = re.compile(r"inventories/(mine|connected)|inventories/\w+/(\.secrets|host_vars)")
    assert len(named) > 20
    assert [one for one in sorted(named) if not made.match(one) and not (ROOT / one).exists()] == []


def test_every_variable_and_metric_exists(check_variables: ModuleType) -> None:
    known = set(check_variables.known_variables()) | set(re.findall(r"llamaherd_\w+", metrics()))
    known |= {"llamaherd_server", "llamaherd_loadtest"}  # packages
    parts = re.compile(r"_(bucket|count|sum)$")
    named = mentioned(r"\b(llamaherd_[a-z0-9_]*[a-z0-9])\b")
    assert len(named) > 20
    assert {name for name in named if parts.sub("", name) not in known} == set()


@pytest.mark.parametrize("text", blocks("yaml"))
def test_variables_that_a_page_sets_pass_the_plays_check(text: str, check_variables: ModuleType) -> None:
    known = check_variables.known_variables()
    for name, value in variables(yaml.safe_load(text)):
        assert name in known
        assert list(check_variables.mistakes(name, value, known[name])) == []


def test_ansible_takes_all_arguments_of_all_plays() -> None:
    found = [match.replace("\\\n", " ").split() for page in PAGES for match in PLAY.findall(page.read_text())]
    words = {word.rstrip(".,") for match in found for word in match if word not in ("-i", "-e")}
    inventories = {word for word in words if word.startswith("inventories/") or word == "hosts.yml"}
    variables = [f"-e{word}" for word in words if "=" in word and not word.startswith("-")]
    rest = {word for word in words - inventories if "=" not in word or word.startswith("-")}
    assert len(rest) > 8
    command = [str(BIN / "ansible-playbook"), "--syntax-check", "-iinventories/example", *variables, *sorted(rest)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", blocks("python"))
def test_python_can_be_read(text: str) -> None:
    ast.parse(text)
