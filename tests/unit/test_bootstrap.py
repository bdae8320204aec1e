"""scripts/bootstrap on machines as newcomers have them: their paths, their environment, their rights."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.unit.conftest import ROOT

PARTS = ("scripts", "server", "loadtest", "inventories", "requirements.lock", "pyproject.toml", "ansible.cfg")
NOBODY = 65534
BINDING = Path.home() / ".cache/llamaherd/loopback/llama.cpp/current/wheel"


def checkout(folder: Path) -> Path:
    """A copy of what scripts/bootstrap reads, which any user may enter."""
    folder.mkdir(parents=True)
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, folder / part)
    return folder


def bootstrap(
    folder: Path, *arguments: str, user: int | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "scripts/bootstrap", *arguments],
        cwd=folder,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        check=False,
        user=user,
    )


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that says why nothing was begun."""
    assert done.returncode == 1
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    return line


def test_a_checkout_works_where_it_is_moved_to_and_whatever_the_environment_holds(tmp_path: Path) -> None:
    first = checkout(tmp_path / "a checkout")
    foreign = {
        "UV_SYSTEM_PYTHON": "1",
        "UV_PYTHON": "/nowhere/python",
        "PIP_TARGET": str(tmp_path / "target"),
        "PYTHONHOME": "/nowhere",
        "LC_ALL": "en_US.UTF-8",
    }
    assert bootstrap(first, environment=foreign).returncode == 0
    assert not (tmp_path / "target").exists()
    moved = first.rename(tmp_path / "moved here")
    assert bootstrap(moved).returncode == 0
    subprocess.run([moved / ".venv/bin/ansible-playbook", "--version"], check=True, capture_output=True)
    assert bootstrap(moved).stdout == ""
    moved.chmod(0o777)  # as on shared drives, where Ansible ignores a configuration that it finds by itself
    typed = "set -e; . '{}/.venv/bin/activate'; ansible --version; locale charmap"
    said = subprocess.check_output(["sh", "-c", typed.format(moved)], env=os.environ | {"LC_ALL": "C"}, text=True)
    assert f"config file = {moved}/ansible.cfg" in said
    assert said.endswith("UTF-8\n")

    (moved / ".venv/bin/python").unlink()
    (moved / ".venv/bin/python").symlink_to("/usr/bin/python-before-an-upgrade")
    assert bootstrap(moved).returncode == 0
    subprocess.run([moved / ".venv/bin/ansible-playbook", "--version"], check=True, capture_output=True)
    assert list(moved.glob(".venv/lib/*/site-packages/llama_cpp")) or not BINDING.exists(), "sync removes it"


@pytest.mark.parametrize("name", ["a:b", "it's", "x[1]", "a\\b", "pa$h"])
def test_a_path_that_build_tools_misread_is_refused(tmp_path: Path, name: str) -> None:
    line = refusal(bootstrap(checkout(tmp_path / name)))
    assert name in line
    assert "move the checkout" in line


def test_a_full_disk_is_refused(tmp_path: Path) -> None:
    assert "999999999 MiB are needed" in refusal(bootstrap(checkout(tmp_path / "here"), "999999999"))


def test_a_home_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    line = refusal(bootstrap(checkout(tmp_path / "here"), environment={"HOME": "/proc", "XDG_CACHE_HOME": ""}))
    assert "/proc/.cache/llamaherd" in line
    assert "set HOME" in line


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_what_sudo_made_is_refused() -> None:
    """As after `sudo make setup`, by the user who may write to the checkout, but not to what root made in it."""
    with TemporaryDirectory() as parent:  # pytest's own are root's alone
        Path(parent).chmod(0o755)
        folder = checkout(Path(parent) / "here")
        for own in (folder, folder / "inventories"):
            os.chown(own, NOBODY, NOBODY)
        (folder / "build").mkdir(mode=0o755)
        line = refusal(bootstrap(folder, user=NOBODY, environment={"HOME": str(folder), "XDG_CACHE_HOME": ""}))
    assert "may not write to build" in line
    assert "sudo chown -R" in line
