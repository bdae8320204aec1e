"""Who uses what: one demo at a time in a checkout, one build in the cache that checkouts share, one owner of herd1."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from demo.jobs import end_jobs
from demo.stages import ROOT, StageFailed

SHARED = Path.home() / ".cache/llamaherd/loopback"
_LOCK = Path("build/demo/lock")
_LAB = Path.home() / ".cache/llamaherd/lab"
_LAB_RUN = Path("/run/llamaherd-lab")
_LAB_OWNER = Path("/run/llamaherd-demo")
_END_WITHIN_S = 120


@contextmanager
def checkout() -> Iterator[None]:
    """This checkout, for one demo; raises StageFailed where another one runs in it."""
    path = ROOT / _LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as lock:
        if not _locked(lock):
            raise StageFailed(
                f"another `make demo` runs in this checkout (process {_content(lock)}); wait for it, or end it with "
                "`make demo-down`"
            )
        _rewrite(lock, str(os.getpid()))
        yield


def end_running_demo() -> None:
    """End the demo that runs in this checkout, which removes what it began; does nothing where none runs."""
    path = ROOT / _LOCK
    if not path.exists():
        return
    deadline = time.monotonic() + _END_WITHIN_S
    with path.open("a+") as lock:
        if not _locked(lock):
            os.kill(int(_content(lock)), signal.SIGTERM)
            while not _locked(lock):
                if time.monotonic() > deadline:
                    raise StageFailed(f"`make demo` (process {_content(lock)}) does not end; kill it, then run again")
                time.sleep(0.2)


@contextmanager
def shared_build() -> Iterator[None]:
    """The build of llama.cpp and the models that all checkouts share; an interrupt ends its background jobs."""
    SHARED.mkdir(parents=True, exist_ok=True)
    with (SHARED / ".lock").open("a+") as lock:
        if not _locked(lock):
            print(f"another demo builds in {SHARED}; waiting for its end", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        except KeyboardInterrupt:
            end_jobs(SHARED)
            raise


def lab_obstacle() -> str:
    """Why no lab host can be this demo's; nothing where herd1 is now ours."""
    probe = ["sh", str(ROOT / "roles/lab/files/obstacle.sh"), str(_LAB)]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    if done.returncode:
        return done.stdout.strip() or done.stderr.strip()
    with _LAB_OWNER.open("a+") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        if other := _other_owner(owner):
            return f"lab host herd1 belongs to the demo in {other}, where `make demo-down` removes it"
        _rewrite(owner, str(ROOT))
    return ""


def lab_is_ours() -> bool:
    """Whether a lab host is there to be removed, and not another checkout's; raises StageFailed where only root may."""
    owned = False
    if _LAB_OWNER.exists():
        with _LAB_OWNER.open() as owner:
            if other := _other_owner(owner):
                print(f"lab host herd1 stays: it belongs to the demo in {other}", flush=True)
                return False
            owned = _content(owner) == str(ROOT)
    is_root = os.geteuid() == 0
    there = owned or (_LAB / "hosts/herd1").exists() or (is_root and _LAB_RUN.exists())
    if there and not is_root:
        raise StageFailed("root booted lab host herd1, and only root can remove it: sudo make demo-down")
    return there


def release_lab() -> None:
    _LAB_OWNER.unlink(missing_ok=True)


def _other_owner(owner: IO[str]) -> str:
    """The other checkout whose demo runs, or whose herd1 does."""
    other = _content(owner)
    if other in ("", str(ROOT)) or not Path(other).is_dir():
        return ""
    try:
        with (Path(other) / _LOCK).open("a+") as lock:
            in_use = not _locked(lock)
    except FileNotFoundError:
        in_use = False
    running = subprocess.run(["pgrep", "-f", "[s]ystemd-nspawn .*--machine=herd1 "], capture_output=True, check=False)
    return other if in_use or running.returncode == 0 else ""


def _locked(file: IO[str]) -> bool:
    """Whether the lock on `file` is ours now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _content(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip()


def _rewrite(file: IO[str], text: str) -> None:
    file.truncate(0)
    file.write(text)
    file.flush()
