"""Debian's programs that a test needs beside what every test has."""

from __future__ import annotations

import shutil
import subprocess

# The lab's tests install too, in another process.
_INSTALL = ["apt-get", "-o", "DPkg::Lock::Timeout=300", "install", "-y", "-q", "--no-install-recommends"]


def need(program: str, *packages: str) -> str:
    """The path of `program`, which `packages` bring where it is not there yet."""
    if not (found := shutil.which(program)):
        subprocess.run(["apt-get", "-q", "update"], check=False, timeout=600)  # nobody waits for this lock
        subprocess.run([*_INSTALL, *packages], check=True, timeout=900)
        found = shutil.which(program)
    assert found, f"{', '.join(packages)} brought no {program}"
    return found
