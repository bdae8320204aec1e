"""Each role that deploys has the tags <role>_install, <role>_configure and <role>_run as far as it has such tasks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from tests.unit.conftest import ROOT
from tests.unit.test_task_names import FILES, entries

PHASES = {
    "llama_cpp": {"install"},
    "model": {"install"},
    "monitoring": {"install", "configure", "run"},
    "nginx": {"install", "configure", "run"},
    "open_webui": {"install", "configure", "run"},
    "rpc": {"install", "configure", "run"},
    "server": {"install", "configure", "run"},
}
TAG = re.compile(r"(\w+)_(install|configure|run)$")


def tags(entry: dict[str, Any]) -> set[str]:
    return set(entry.get("tags", ()))


def tasks(path: Path) -> list[dict[str, Any]]:
    """The tasks of a file, and the roles of its plays, which have tags as well."""
    found = list(entries(yaml.safe_load(path.read_text())))
    return found + [role for play in found for role in play.get("roles", ())]


def test_every_role_has_the_tags_of_its_phases() -> None:
    found: dict[str, set[str]] = {}
    for path in FILES:
        for tag in set().union(*map(tags, tasks(path))):
            if phase := TAG.match(tag):
                found.setdefault(phase[1], set()).add(phase[2])
    assert found == PHASES


def test_an_include_with_tags_applies_them_to_what_it_includes() -> None:
    """Ansible selects the include by its tags, and then the tasks in it by theirs alone."""
    for path in FILES:
        for entry in tasks(path):
            for module in ("ansible.builtin.include_tasks", "ansible.builtin.include_role"):
                if tags(entry) and module in entry:
                    applied = entry[module].get("apply", {}) if isinstance(entry[module], dict) else {}
                    assert tags(applied) & tags(entry), f"{path.relative_to(ROOT)}: {entry['name']}"
