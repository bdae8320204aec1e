"""Starts each product on a free port with the same model, the same libllama and the same flags."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CACHE = Path.home() / ".cache/llamaherd"
WORK = Path(__file__).resolve().parent.parent / "build/bench/work"


@dataclass(frozen=True)
class Flags:
    """Flags for every product. Beside other work, threads that wait for each other are slow: set BENCH_THREADS=1."""

    parallel: int
    ctx_per_slot: int
    unified: bool
    batch: int = 2048
    ubatch: int = 512
    threads: int = int(os.environ.get("BENCH_THREADS", os.cpu_count() or 1))


@dataclass(frozen=True)
class Running:
    port: int
    pid: int

    @property
    def rss_mib(self) -> float:
        """Return the resident memory of the process and its children. Mapped weights count once for each process."""
        return sum(_rss_mib(pid) for pid in _tree(self.pid))

    @property
    def cpu_s(self) -> float:
        """Return the CPU time of the process and its children in seconds."""
        return sum(cpu_s(pid) for pid in _tree(self.pid))

    def kill_worker(self) -> None:
        """Kill our server's engine process with SIGKILL and wait until another one is ready."""
        killed = self._worker()
        assert killed  # noqa: S101 (a server that is ready has one)
        os.kill(killed, signal.SIGKILL)
        deadline = time.monotonic() + 120
        while self._worker() in (None, killed) or not _answers(f"http://127.0.0.1:{self.port}/readyz"):
            if time.monotonic() > deadline:
                raise RuntimeError("no other engine is ready 120 s after the first was killed")
            time.sleep(0.1)

    def _worker(self) -> int | None:
        return next((pid for pid in _tree(self.pid) if "llamaherd_server.worker" in _command(pid)), None)

    def metrics(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as reply:
            return str(reply.read().decode())


@contextmanager
def ours(
    flags: Flags, config_lines: str = "", environment: Mapping[str, str] | None = None, *, model: str | None = None
) -> Iterator[Running]:
    """Run our server. `config_lines` are further lines and tables of server.toml, after [engine]."""
    port = free_port()
    WORK.mkdir(parents=True, exist_ok=True)
    config = WORK / f"server-{port}.toml"
    config.write_text(
        f'[http]\nport = {port}\n[model]\nname = "bench"\npath = {json.dumps(model or _model())}\n'
        f"[engine]\nparallel = {flags.parallel}\nctx_per_slot = {flags.ctx_per_slot}\n"
        f"batch = {flags.batch}\nubatch = {flags.ubatch}\nkv_unified = {str(flags.unified).lower()}\n"
        f"threads = {flags.threads}\nthreads_batch = {flags.threads}\n{config_lines}"
    )
    command = [sys.executable, "-m", "llamaherd_server", "--config", str(config)]
    with process(command, port, "/readyz", environment) as running:
        yield running


@contextmanager
def llama_server(flags: Flags | None, *more: str, model: str | None = None) -> Iterator[Running]:
    """Run llama-server; without `flags`, with its own defaults."""
    port = free_port()
    context = [] if flags is None else _flags(flags)
    command = [
        str(Path(os.environ["LLAMAHERD_TEST_BIN_DIR"]) / "llama-server"),
        *("--model", model or _model(), "--port", str(port), "--alias", "bench"),
        *context,
        *more,
    ]
    with process(command, port, "/health") as running:
        yield running


def _flags(flags: Flags) -> list[str]:
    return [
        *("--parallel", str(flags.parallel), "--ctx-size", str(flags.parallel * flags.ctx_per_slot)),
        "--kv-unified" if flags.unified else "--no-kv-unified",
        *("--batch-size", str(flags.batch), "--ubatch-size", str(flags.ubatch)),
        *("--threads", str(flags.threads), "--threads-batch", str(flags.threads)),
    ]


@contextmanager
def lcp_example(flags: Flags) -> Iterator[Running]:
    """Run llama-cpp-python's example server from the pinned source distribution."""
    port = free_port()
    config = WORK / f"example-{port}.json"
    script = _example_server()
    model = {
        "path": _model(),
        "alias": "bench",
        "n_ctx": flags.parallel * flags.ctx_per_slot,
        "max_seq_len": flags.ctx_per_slot,
        "n_seq_max": flags.parallel,
        "n_batch": flags.batch,
        "n_ubatch": flags.ubatch,
        "threads": flags.threads,
        "threads_batch": flags.threads,
        "kv_unified": flags.unified,
    }
    config.write_text(json.dumps({"server": {"host": "127.0.0.1", "port": port}, "model": model}))
    with process([sys.executable, str(script), "-C", str(config)], port, "/healthz") as running:
        yield running


def _model() -> str:
    return os.environ["LLAMAHERD_TEST_MODEL"]


def _example_server() -> Path:
    target = WORK / "example_server.py"
    if not target.exists():
        WORK.mkdir(parents=True, exist_ok=True)
        source = next(CACHE.rglob("llama_cpp_python-*.tar.gz"))
        with tarfile.open(source) as archive:
            member = next(m for m in archive if m.name.endswith("/examples/server/server.py"))
            content = archive.extractfile(member)
            target.write_bytes(content.read() if content else b"")
    return target


@contextmanager
def process(
    command: list[str], port: int, health: str, environment: Mapping[str, str] | None = None
) -> Iterator[Running]:
    log = WORK / f"{port}.log"
    WORK.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        child = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True, env={**os.environ, **(environment or {})}
        )
    try:
        _wait(child, f"http://127.0.0.1:{port}{health}", log)
        yield Running(port, child.pid)
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _wait(child: subprocess.Popen[bytes], url: str, log: Path) -> None:
    for _ in range(240):
        if child.poll() is not None:
            break
        if _answers(url):
            return
        time.sleep(0.5)
    raise RuntimeError(f"{child.args!r} did not become ready; the end of its log:\n{log.read_text()[-2000:]}")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (OSError, urllib.error.HTTPError):
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tree(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(grandchild for child in children for grandchild in _tree(int(child)))]


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def cpu_s(pid: int) -> float:
    """Return user and system CPU time of one process without its children in seconds, proc(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0
