"""The server as a plain process on loopback, for machines where no host can be booted."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from demo.stages import ROOT, StageFailed

HERD = Path.home() / ".cache/llamaherd/loopback"
PID = ROOT / "build/demo/server.pid"
LOG = ROOT / "build/demo/server.log"
READY = "http://127.0.0.1:8080/readyz"


def start() -> None:
    """Start the deployed server and return when its model answers; raises StageFailed with its last words."""
    LOG.parent.mkdir(parents=True, exist_ok=True)
    lib = HERD / "llama.cpp/current/lib"
    env = os.environ | {"LLAMA_CPP_LIB_PATH": str(lib), "MTMD_CPP_LIB": str(lib)}
    python = HERD / "server/current/venv/bin/python"
    command = [str(python), "-m", "llamaherd_server", "--config", str(HERD / "config/server.toml")]
    with LOG.open("w") as log:
        child = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    PID.write_text(str(child.pid))
    for _ in range(240):
        if child.poll() is not None:
            last = LOG.read_text().strip().splitlines()[-1:] or ["no output"]
            raise StageFailed(f"the server ended with exit code {child.returncode}: {last[0]}")
        if ready():
            return
        time.sleep(0.5)
    raise StageFailed(f"the server was not ready after two minutes; see {LOG}")


def stop() -> None:
    """End the server that start() left running, and only it."""
    if not PID.exists():
        return
    pid = int(PID.read_text())
    if is_ours(pid):
        os.kill(pid, signal.SIGTERM)
        while is_ours(pid):
            time.sleep(0.1)
    PID.unlink()


def is_ours(pid: int) -> bool:
    """A pid file outlives a reboot: the number may be somebody else's by now."""
    command = subprocess.run(
        ["ps", "-ww", "-p", str(pid), "-o", "command="], capture_output=True, text=True, check=False
    )
    return "llamaherd_server" in command.stdout


def ready() -> bool:
    try:
        with urllib.request.urlopen(READY, timeout=2) as reply:
            return bool(reply.status == 200)
    except (OSError, urllib.error.HTTPError):
        return False
