"""The real server process with the real model, started once for all tests that only talk to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

START_S = 60


@dataclass(frozen=True)
class Server:
    """A running server; `log` is its standard error."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def terminate(self) -> int:
        """Send SIGTERM and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(START_S)


def required(variable: str) -> str:
    """A path that `make test` gives; without it the test fails."""
    value = os.environ.get(variable)
    if not value:
        pytest.fail(f"{variable} is not set: run the tests with `make test`")
    return value


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def write_config(folder: Path, **sections: Any) -> Path:
    """A server.toml for the test model; `sections` are put over small defaults. `models`, a list, takes its place."""
    tables: dict[str, Any] = {
        "http": {"port": free_port()},
        "model": {"name": "smollm2", "aliases": [], "path": required("LLAMAHERD_TEST_MODEL")},
        # one thread: on a busy machine two that wait for each other are many times slower
        "engine": {"parallel": 2, "ctx_per_slot": 512, "batch": 256, "ubatch": 128, "threads": 1, "threads_batch": 1},
        "limits": {},
    }
    for name, values in sections.items():
        tables[name] = values if isinstance(values, list) else {**tables.get(name, {}), **values}
    if "models" in tables:
        del tables["model"]
    lines = []
    for name, values in tables.items():
        for table in values if isinstance(values, list) else [values]:
            head = f"[[{name}]]" if isinstance(values, list) else f"[{name}]"
            lines += [head, *(f"{key} = {_toml(value)}" for key, value in table.items())]
    path = folder / "server.toml"
    path.write_text("\n".join(lines))
    return path


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, default=str)


def spawn(config: Path, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    """Start the server's command; its standard error goes to server.log beside the configuration."""
    libraries = required("LLAMAHERD_TEST_LIB_DIR")
    library = {"LLAMA_CPP_LIB_PATH": libraries, "MTMD_CPP_LIB": libraries}
    with config.with_name("server.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "llamaherd_server", "--config", str(config), *arguments],
            stderr=log,
            env={**os.environ, **library, **environment},
        )


@contextmanager
def running(folder: Path, environment: dict[str, str] | None = None, **sections: Any) -> Iterator[Server]:
    """A server that is ready; what it logged is shown when it never becomes so."""
    config = write_config(folder, **sections)
    port = sections.get("http", {}).get("port") or int(config.read_text().split("port = ")[1].split()[0])
    process = spawn(config, **environment or {})
    with until_ready(Server(f"http://127.0.0.1:{port}", process, config.with_name("server.log"))) as server:
        yield server


@contextmanager
def until_ready(server: Server) -> Iterator[Server]:
    """The server once it is ready; its process is gone after the block."""
    try:
        wait_ready("the server", f"{server.url}/readyz", server.process, server.log)
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()


def paced(**values: object) -> dict[str, str]:
    """The environment of a server whose worker is paced_worker.py; `values`: its PACED_ variables."""
    here = Path(__file__).parent
    worker = {"PYTHONPATH": str(here / "doubled"), "WORKER_DOUBLE": str(here / "paced_worker.py")}
    return worker | {f"PACED_{name.upper()}": str(value) for name, value in values.items()}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server without keys."""
    with running(tmp_path_factory.mktemp("server")) as started:
        yield started


def wait_ready(what: str, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until `url` answers with 200; a process that ends before, or takes too long, fails the test with its log."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    pytest.fail(f"{what} did not become ready; its log:\n{log.read_text()}")
