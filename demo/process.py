"""The server as a plain process on loopback, for machines where no host can be booted."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx

from demo.claims import SHARED
from demo.stages import ROOT, StageFailed

# What is this checkout's own; llama.cpp and the models are shared with other checkouts.
STATE = ROOT / "build/demo"
PREFIX = STATE / "prefix"
CONFIG = STATE / "config/server.toml"
PID = STATE / "server.pid"
LOG = STATE / "server.log"
KEY = ROOT / "inventories/loopback/.secrets/keys/default"
_FIRST_PORT = 8080
_READY_WITHIN_S = 300
_STOP_WITHIN_S = 60


@contextmanager
def held_port() -> Iterator[int]:
    """The first free port from 8080 on, which no other program can take before the end of the block."""
    with socket.socket() as held:
        # As the server does: connections that have just ended do not count.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for port in (*range(_FIRST_PORT, _FIRST_PORT + 100), 0):
            with suppress(OSError):
                held.bind(("127.0.0.1", port))
                held.listen(0)
                break
        port = held.getsockname()[1]
        if port != _FIRST_PORT:
            print(f"port {_FIRST_PORT} is taken; the demo's server gets port {port}", flush=True)
        yield port


def variables(port: int) -> str:
    """What differs from inventories/loopback, as ansible-playbook's -e takes it."""
    (SHARED / "llama.cpp").mkdir(parents=True, exist_ok=True)
    PREFIX.mkdir(parents=True, exist_ok=True)
    link = PREFIX / "llama.cpp"
    link.unlink(missing_ok=True)
    link.symlink_to(SHARED / "llama.cpp")
    return json.dumps(
        {
            "llamaherd_prefix": str(PREFIX),
            "llamaherd_state_dir": str(SHARED / "state"),
            "llamaherd_config_dir": str(CONFIG.parent),
            "llamaherd_server_port": port,
        }
    )


def start(port: int) -> None:
    """Start the deployed server and return when its model answers; raises StageFailed with its last words."""
    # Another checkout may make another release the current one.
    lib = (SHARED / "llama.cpp/current").resolve() / "lib"
    env = os.environ | {"LLAMA_CPP_LIB_PATH": str(lib), "MTMD_CPP_LIB": str(lib)}
    python = (PREFIX / "server/current").resolve() / "venv/bin/python"
    command = [str(python), "-m", "llamaherd_server", "--config", str(CONFIG)]
    with LOG.open("w") as log:
        child = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    PID.write_text(str(child.pid))
    deadline = time.monotonic() + _READY_WITHIN_S
    while not ready(port):
        if child.poll() is not None:
            raise StageFailed(f"the server ended with exit code {child.returncode}: {_last_words()}")
        if time.monotonic() > deadline:
            stop()
            raise StageFailed(f"the server was not ready after {_READY_WITHIN_S} s: {_last_words()}")
        time.sleep(0.5)


def stop() -> None:
    """End the server that start() left running, and only it."""
    if not PID.exists():
        return
    pid = int(PID.read_text() or 0)
    if is_ours(pid):
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_WITHIN_S
        while is_ours(pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        with suppress(ProcessLookupError):  # its engine, where it did not end in time
            os.killpg(pid, signal.SIGKILL)
    PID.unlink()


def is_ours(pid: int) -> bool:
    """A pid file outlives a reboot: the number may be somebody else's by now."""
    command = subprocess.run(
        ["ps", "-ww", "-p", str(pid), "-o", "stat=,command="], capture_output=True, text=True, check=False
    ).stdout.strip()
    return str(CONFIG) in command and not command.startswith("Z")


def ready(port: int) -> bool:
    """Whether the model answers at `port`, in a server that knows the key of this checkout."""
    key = {"Authorization": f"Bearer {KEY.read_text().strip()}"}
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=key, timeout=5, trust_env=False) as client:
            return client.get("/readyz").is_success and client.get("/v1/models").is_success
    except httpx.HTTPError:
        return False


def _last_words() -> str:
    return "\n".join(LOG.read_text(errors="replace").strip().splitlines()[-10:]) or "it printed nothing"
