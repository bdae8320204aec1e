"""A model whose layers lie in another process: llama-server over the real rpc-server, as the role builds both."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from ..conftest import Server, free_port, required, running
from .conftest import native

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[3]
PREFIX = Path.home() / ".cache/llamaherd/rpc"
ASK = {"prompt": "One, two, three, four,", "max_tokens": 16, "temperature": 0}


@pytest.fixture(scope="module")
def release() -> Path:
    """What deploy.yml builds on a host that computes over RPC."""
    own: dict[str, Any] = {"llamaherd_prefix": str(PREFIX), "llamaherd_state_dir": str(PREFIX / "state")}
    # As llamaherd_rpc_workers has it built; preflight would ask for systemd, which runs the worker.
    targets = yaml.safe_load((ROOT / "roles/llama_cpp/defaults/main.yml").read_text())["llamaherd_llama_cpp_targets"]
    own["llamaherd_llama_cpp_targets"] = [*targets, "ggml-rpc-server"]
    own["llamaherd_llama_cpp_cmake_flags"] = ["-DGGML_RPC=ON"]
    play = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "inventories/loopback"]
    command = [*play, "playbooks/deploy.yml", "--tags", "llama_cpp", "-e", json.dumps(own)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    return PREFIX / "llama.cpp/current"


@contextmanager
def rpc_worker(release: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [str(release / "bin/ggml-rpc-server"), "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def spread(release: Path, folder: Path, port: int) -> Iterator[Server]:
    engine = native(rpc=[f"127.0.0.1:{port}"], parallel=2) | {"binary": str(release / "bin/llama-server")}
    with running(folder, engine=engine) as server:
        yield server


def answer(server: Server) -> Any:
    return httpx.post(f"{server.url}/v1/completions", json=ASK, timeout=60).json()["choices"][0]["text"]


def test_the_worker_holds_the_weights_and_the_answer_is_the_same(release: Path, tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "alone").mkdir()
    with running(tmp_path / "alone", engine=native(parallel=2)) as alone:
        expected = answer(alone)
    with rpc_worker(release, port) as worker, spread(release, tmp_path, port) as server:
        assert answer(server) == expected
        [resident] = [
            line for line in Path(f"/proc/{worker.pid}/status").read_text().splitlines() if line.startswith("VmRSS")
        ]
        assert int(resident.split()[1]) * 1024 > Path(required("LLAMAHERD_TEST_MODEL")).stat().st_size / 2


def test_the_server_comes_back_with_its_worker(release: Path, tmp_path: Path) -> None:
    port = free_port()
    with rpc_worker(release, port) as worker, spread(release, tmp_path, port) as server:
        worker.kill()
        worker.wait()
        failed = httpx.post(f"{server.url}/v1/completions", json=ASK, timeout=60)
        assert failed.status_code >= 500
        assert "error" in failed.json()
        with rpc_worker(release, port):
            while httpx.get(f"{server.url}/readyz").status_code != 200:
                time.sleep(0.2)
            assert answer(server)
