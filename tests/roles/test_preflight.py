"""What preflight says of this machine as the host of inventories/loopback, before anything is built."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from demo.stages import reason
from tests.roles.conftest import ROOT

COMPILERS = ("cc", "gcc", "clang", "c++", "g++", "clang++")


def without(programs: tuple[str, ...], folder: Path) -> str:
    """A PATH that has all programs of ours but these."""
    folder.mkdir()
    for directory in reversed(os.get_exec_path()):
        if not os.access(directory, os.R_OK | os.X_OK):  # such as root's, which su leaves in the PATH
            continue
        for program in Path(directory).glob("*"):
            (folder / program.name).unlink(missing_ok=True)
            (folder / program.name).symlink_to(program)
    for name in programs:
        (folder / name).unlink(missing_ok=True)
    return str(folder)


def preflight(path: str, prefix: Path) -> tuple[int, list[str]]:
    """Exit code and output of the play that refuses, on a host that has no llama.cpp and takes no packages."""
    variables = json.dumps({"llamaherd_prefix": str(prefix), "llamaherd_install_packages": False})
    command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "inventories/loopback"]
    command += ["playbooks/deploy.yml", "--tags", "always", "-e", variables]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    return done.returncode, (done.stdout + done.stderr).splitlines()


def test_a_compiler_that_is_missing_is_named_with_its_package(tmp_path: Path) -> None:
    path = without((*COMPILERS, "cmake", "ninja"), tmp_path / "bin")
    assert shutil.which("cc", path=path) is None
    rc, output = preflight(path, tmp_path / "none")
    assert rc != 0
    assert reason(output).startswith("localhost has no cc, c++ to build llama.cpp with; install ")


def test_cmake_and_ninja_may_be_missing(tmp_path: Path) -> None:
    """They come as wheels where no package may be installed."""
    path = without(("cmake", "ninja"), tmp_path / "bin")
    rc, output = preflight(path, tmp_path / "none")
    assert rc == 0, reason(output)
