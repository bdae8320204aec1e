"""Each file says in its first lines what it is for, and each exception to a rule why it is one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.tree import ROOT, tracked

TRACKED = tracked()
PYTHON = [path for path in TRACKED if path.suffix == ".py" and (ROOT / path).stat().st_size]
# Those of a role that say it by where they are.
PLACED = re.compile(r"(^|/)(defaults|vars|meta)/")
OTHERS = [
    path
    for path in TRACKED
    if path.suffix in (".yml", ".j2", ".service", ".container")
    and not PLACED.search(str(path))
    and not path.is_symlink()
]


def test_every_module_has_a_docstring() -> None:
    assert len(PYTHON) > 100
    assert [path for path in PYTHON if not ast.get_docstring(ast.parse((ROOT / path).read_text()))] == []


def test_every_other_file_begins_with_what_it_is() -> None:
    said = re.compile(r"^\s*(\{#|#(?! [{[]+ ansible_managed)|(- )?name:|Description=)", re.MULTILINE)
    assert len(OTHERS) > 50
    assert [path for path in OTHERS if not said.search((ROOT / path).read_text()[:300])] == []


def test_no_rule_is_broken_without_a_reason() -> None:
    bare = re.compile(r"# (ruff: )?noqa(?!: [A-Z]+\d+(, [A-Z]+\d+)* \()")
    found = [
        f"{path}: {line.strip()}"
        for path in PYTHON
        for line in (ROOT / path).read_text().splitlines()
        if bare.search(line) and path.name != Path(__file__).name
    ]
    assert found == []
