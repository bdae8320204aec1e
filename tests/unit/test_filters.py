"""The filters: what a release's name depends on, and TOML as a TOML parser reads it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import ModuleType

from hypothesis import given
from hypothesis import strategies as st


def test_a_trees_hash_follows_names_and_contents_alone(filters: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package/a.py").write_text("a")
    first = filters.tree_hash(str(tmp_path))
    (tmp_path / "package/__pycache__").mkdir()
    (tmp_path / "package/__pycache__/a.pyc").write_text("compiled")
    (tmp_path / ".hidden").write_text("an editor's")
    assert filters.tree_hash(str(tmp_path)) == first
    (tmp_path / "package/a.py").rename(tmp_path / "package/b.py")
    second = filters.tree_hash(str(tmp_path))
    (tmp_path / "package/b.py").write_text("b")
    assert len({first, second, filters.tree_hash(str(tmp_path))}) == 3


@given(st.text(st.characters(codec="utf-8")), st.integers(-(2**63), 2**63 - 1), st.booleans())
def test_toml_reads_back(filters: ModuleType, text: str, number: int, flag: bool) -> None:
    table = {"text": text, "number": number, "flag": flag}
    assert tomllib.loads(filters.to_toml(table)) == table
