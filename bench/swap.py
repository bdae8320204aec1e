"""Models on demand with one in memory at a time: the cost of a swap, and whether a mixed load loses requests.

`turns`: requests of one token alternate between two models, so that each waits until its model is loaded. `mixed`: 60
streams of 16 tokens to both within 10 s. Both models are the same file with two names. llama-server runs as a router
with --models-max 1. `lost` counts responses that did not complete.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from os import environ
from pathlib import Path
from statistics import median

from bench.client import complete
from bench.servers import WORK, Running, free_port, process
from bench.serving import ROUNDS
from bench.table import Result, Rounds, metric

NAMES = ("first", "second")
SWAPS, STREAMS, WITHIN_S, TOKENS = 8, 60, 10.0, 16


@contextmanager
def ours() -> Iterator[Running]:
    port, path = free_port(), json.dumps(environ["LLAMAHERD_TEST_MODEL"])
    engine = "[models.engine]\nparallel = 4\nctx_per_slot = 2048\n"
    models = [f'[[models]]\nname = "{name}"\npath = {path}\nresidence = "on_demand"\n{engine}' for name in NAMES]
    WORK.mkdir(parents=True, exist_ok=True)
    config = WORK / f"swap-{port}.toml"
    config.write_text(f"[http]\nport = {port}\n" + "".join(models))
    with process([sys.executable, "-m", "llamaherd_server", "--config", str(config)], port, "/readyz") as running:
        yield running


@contextmanager
def llama_server() -> Iterator[Running]:
    port, folder = free_port(), WORK / "swap-models"
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        link = folder / f"{name}.gguf"
        link.unlink(missing_ok=True)
        link.symlink_to(environ["LLAMAHERD_TEST_MODEL"])
    program = Path(environ["LLAMAHERD_TEST_BIN_DIR"]) / "llama-server"
    flags = ["--models-dir", str(folder), "--models-max", "1", "--parallel", "4", "--ctx-size", "8192"]
    with process([str(program), "--port", str(port), *flags], port, "/health") as running:
        yield running


PRODUCTS: dict[str, Callable[[], AbstractContextManager[Running]]] = {"ours": ours, "llama_server": llama_server}


def run() -> Result:
    times: Rounds = {product: [] for product in PRODUCTS}
    lost: Rounds = {product: [] for product in PRODUCTS}
    whole: Rounds = {product: [] for product in PRODUCTS}
    for number in range(ROUNDS):
        for product, start in PRODUCTS.items():
            with start() as server:
                times[product].append(asyncio.run(_turns(server.port)))
                began = time.perf_counter()
                lost[product].append(asyncio.run(_mixed(server.port, number)))
                whole[product].append(time.perf_counter() - began)
            figures = f"swap {times[product][-1]:.2f} s, mixed {whole[product][-1]:.1f} s, lost {lost[product][-1]:.0f}"
            print(f"swap round {number + 1}/{ROUNDS} {product}: {figures}", flush=True)
    return {
        "turns": {"swap_s": metric(times)},
        "mixed": {"lost": metric(lost), "in_all_s": metric(whole)},
    }


async def _turns(port: int) -> float:
    """Return the median seconds of a request whose model has to be loaded first."""
    taken = []
    for number in range(SWAPS + 1):
        began = time.perf_counter()
        await complete(port, "Hello", 1, model=NAMES[number % 2])
        taken.append(time.perf_counter() - began)
    return median(taken[1:])  # the first found nothing to unload


async def _mixed(port: int, seed: int) -> float:
    rng = random.Random(seed)
    plan = [(rng.random() * WITHIN_S, rng.choice(NAMES)) for _ in range(STREAMS)]

    async def one(after: float, model: str) -> bool:
        await asyncio.sleep(after)
        try:
            await complete(port, "Hello", TOKENS, model=model)
        except (RuntimeError, OSError) as error:
            print(f"swap: {model}: {error}", flush=True)
            return False
        return True

    return float((await asyncio.gather(*(one(*each) for each in plan))).count(False))
