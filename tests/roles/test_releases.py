"""Which release folders are left when `current` moves: on this machine's disk, without a host."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import yaml

from tests.roles.conftest import play


@pytest.mark.parametrize(
    ("keep", "key", "left"),
    [(3, "e", {"e", "d", "c"}), (1, "e", {"e", "d"}), (3, "b", {"b", "d", "e"})],
    ids=["a new one", "the previous one stays in any case", "back to an older one"],
)
def test_the_newest_are_kept(tmp_path: Path, keep: int, key: str, left: set[str]) -> None:
    root = tmp_path / "releases"
    for age, name in enumerate("abcde"):
        (root / name).mkdir(parents=True)
        os.utime(root / name, (age, age))
    (root / "current").symlink_to("d")
    (root / "previous").symlink_to("a")
    variables = {
        "ansible_python_interpreter": sys.executable,
        "llamaherd_keep_releases": keep,
        "llamaherd_service_manager": "none",
        "_common_release_root": str(root),
        "_common_release_key": key,
    }
    role = {"ansible.builtin.include_role": {"name": "common", "tasks_from": "activate"}}
    playbook = tmp_path / "activate.yml"
    playbook.write_text(
        yaml.safe_dump([{"hosts": "localhost", "gather_facts": False, "vars": variables, "tasks": [role]}])
    )
    run = play(tmp_path, "-i", "localhost,", "-c", "local", str(playbook))
    assert run.returncode == 0, run.stdout + run.stderr
    assert {path.name for path in root.iterdir() if not path.is_symlink()} == left
    assert ((root / "current").readlink(), (root / "previous").readlink()) == (Path(key), Path("d"))
