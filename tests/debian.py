"""Debian's programs that some tests need beside what every test has."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

# Program to packages; what would start a service is unpacked into the cache, which needs no root.
INSTALLED = {
    "buildah": ("buildah", "podman", "crun"),
    "chromedriver": ("chromium-driver",),
    "chromium": ("chromium",),
    "gpg": ("gpg", "gpg-agent"),
    "openssl": ("openssl",),
    "ps": ("procps",),
}
UNPACKED = {
    "nginx": ("nginx",),
    "prometheus": ("prometheus",),
    "promtool": ("prometheus", "promtool"),
}  # the first that has it
# What make test needs; test_container and test_cuda fetch their own.
OF_EVERY_RUN = ("chromium", "chromedriver", "openssl", "ps", *UNPACKED)
CACHE = Path.home() / ".cache/llamaherd/debian"
# The lab's tests install too, in another process.
_INSTALL = ["apt-get", "-o", "DPkg::Lock::Timeout=300", "install", "-y", "-q", "--no-install-recommends"]


def find(program: str) -> str | None:
    """The path of `program`, installed or unpacked."""
    roots = [CACHE / package / "usr" for package in UNPACKED.get(program, ())]
    unpacked = os.pathsep.join(f"{root}/sbin:{root}/bin" for root in roots)
    return shutil.which(program) or (shutil.which(program, path=unpacked) if roots else None)


def need(program: str) -> str:
    """The path of `program`; fails the test when it cannot be had."""
    if refusal := obtain([program]):
        pytest.fail(refusal)
    return str(find(program))


def obtain(programs: Iterable[str]) -> str:
    """Install or unpack those that are missing; one line of which package could not be had and why, or nothing."""
    if not any(find(program) is None for program in programs):
        return ""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = [program for program in programs if find(program) is None]
        packages = sorted({name for program in missing for name in INSTALLED.get(program, ())})
        unpacked = [program for program in missing if program in UNPACKED]
        failures = [_install(packages)] if packages else []
        failures += map(_unpack, unpacked)
    reasons = "; ".join(filter(None, failures))
    return reasons and f"{reasons}: install with `apt-get install {' '.join([*packages, *unpacked])}` as root"


def _install(packages: list[str]) -> str:
    what = f"Debian's {', '.join(packages)}"
    if os.geteuid() != 0:
        return f"{what} cannot be installed by a user without root"
    return _run([*_INSTALL, *packages], what)


def _unpack(program: str) -> str:
    failure = ""
    for package in UNPACKED[program]:
        if find(program) is None:
            target = CACHE / package
            target.mkdir(exist_ok=True)
            fetch = f"apt-get download -q {package} && dpkg-deb -x {package}_*.deb . && rm {package}_*.deb"
            failure = _run(["sh", "-c", fetch], f"Debian's {package}", cwd=target)
    return "" if find(program) else failure or f"Debian's {' and '.join(UNPACKED[program])} have no {program}"


def _run(command: list[str], what: str, cwd: Path | None = None) -> str:
    """Nothing, or why it failed. Reads the package lists again where they do not serve."""
    if not shutil.which("apt-get"):
        return f"{what} cannot be installed without apt-get"
    for again in (False, True):
        if again and os.geteuid() == 0:
            subprocess.run(["apt-get", "-q", "update"], check=False, timeout=600, capture_output=True)
        done = subprocess.run(command, cwd=cwd, check=False, timeout=900, capture_output=True, text=True)
        if done.returncode == 0:
            return ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("E: ")] or done.stderr.splitlines()[-1:]
    return f"{what} cannot be installed ({(errors or ['no reason given'])[0].removeprefix('E: ')})"
