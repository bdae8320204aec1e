"""CPU cost of one event in the clients of load tests: ours, guidellm's and aiperf's on the same paced server.

The peers are installed from PyPI, each in an environment of its own in ~/.cache/llamaherd/bench. guidellm's has no
torch (several GB), which its HTTP client does not need.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.servers import CACHE
from bench.table import Result, metric

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "5"))
HERE = Path(__file__).resolve().parent
DOUBLE = HERE.parent / "tests/loadtest/double.py"
KEY = "sesame"
TOKENS = 100
PEERS = {"guidellm": ["guidellm==0.8.1", "jinja2"], "aiperf": ["aiperf==0.13.0"]}


def run() -> Result:
    pythons = {"ours": Path(sys.executable)} | {peer: install(peer) for peer in PEERS}
    return {f"streams_{streams}": {"cpu_us_per_event": metric(rounds(pythons, streams))} for streams in (1, 16, 64)}


def rounds(pythons: dict[str, Path], streams: int) -> dict[str, list[float]]:
    """Measure all products in each round, so that a slow minute affects all of them."""
    costs: dict[str, list[float]] = {product: [] for product in pythons}
    for number in range(ROUNDS):
        for product, python in pythons.items():
            with double() as url:
                costs[product].append(measure(python, product, url, streams))
            print(
                f"{streams} streams round {number + 1}/{ROUNDS} {product:<10}{costs[product][-1]:7.1f} us", flush=True
            )
    return costs


def measure(python: Path, product: str, url: str, streams: int) -> float:
    arguments = [product, url, KEY, str(streams), str(TOKENS)]
    done = subprocess.run(
        [python, HERE / "stream_clients.py", *arguments], check=False, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        raise RuntimeError(f"{product}'s client failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def install(peer: str) -> Path:
    """Return the Python of a peer's environment, which is created if it is missing."""
    home = CACHE / "bench" / peer
    python, done = home / "bin/python", home / ".installed"
    if not done.exists():
        print(f"installing {' '.join(PEERS[peer])}", flush=True)
        uv = CACHE / "tool/bin/uv"
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, home], check=True)
        without = home / "overrides.txt"
        without.write_text("torch ; python_version < '3'\n")
        subprocess.run(
            [uv, "pip", "install", "--quiet", "--python", python, "--override", without, *PEERS[peer]], check=True
        )
        done.touch()
    return python


@contextmanager
def double() -> Iterator[str]:
    with subprocess.Popen([sys.executable, DOUBLE], stdout=subprocess.PIPE, text=True) as server:
        try:
            yield f"http://127.0.0.1:{int(server.stdout.readline()) if server.stdout else 0}"
        finally:
            server.terminate()
