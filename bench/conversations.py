"""How much of computed prompts chats with several turns find again when there are more chats than slots.

`turns_*`: 16 chats take turns on 4 slots; the second and later turns count. `restart_*`: 4 long chats on 2 slots, one
request at a time; each phase is one turn of all chats. Models are dense (SmolLM2), hybrid and sliding-window (random
weights). Compared with llama-server, whose prompt cache and checkpoints have their defaults.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from bench import servers
from bench.client import Sample, chat
from bench.servers import WORK, Flags, Running
from bench.serving import ROUNDS, Figures, p95, words
from bench.table import Metric, Result, Rounds, metric
from tests.random_models import RandomModel

Start = Callable[..., AbstractContextManager[Running]]
PRODUCTS: dict[str, Start] = {"ours": servers.ours, "llama_server": servers.llama_server}
MODELS: dict[str, Callable[[], str | None]] = {
    "dense": lambda: None,
    "hybrid": lambda: str(RandomModel("hybrid").path()),
    "sliding_window": lambda: str(RandomModel("sliding_window").path()),
}
SLOTS, CHATS, TURNS, PROMPT_WORDS = 4, 16, 4, 600
NEXT_WORDS, ANSWER_TOKENS = 12, 32
LONG_CHATS, LONG_PROMPT_WORDS = 4, 4000
SHARE_BOUND, WARM_BOUND, COLD_BOUND = 0.95, 1.2, 0.05
KEPT = ("killed", "restarted", "upgraded")
SERVER = Path(__file__).resolve().parent.parent / "server/llamaherd_server"


class Chat:
    """A conversation with the answers so far in its history."""

    def __init__(self, seed: str, length: int) -> None:
        self._generator = random.Random(seed)
        self._messages: list[dict[str, str]] = []
        self._next = length

    async def turn(self, port: int) -> Sample:
        self._messages.append({"role": "user", "content": words(self._generator, self._next)})
        self._next = NEXT_WORDS
        sample = await chat(port, self._messages, ANSWER_TOKENS)
        self._messages.append({"role": "assistant", "content": sample.text})
        return sample


def run() -> Result:
    scenarios = {f"{kind}_{model}": (kind, model) for kind in ("turns", "restart") for model in MODELS}
    wanted = os.environ.get("BENCH_SCENARIOS", ",".join(scenarios)).split(",")
    measures = {"turns": turns, "restart": restart}
    return {name: measures[scenarios[name][0]](name, MODELS[scenarios[name][1]]()) for name in wanted}


def turns(name: str, model: str | None) -> dict[str, Metric]:
    rounds: dict[str, Rounds] = {}
    for number in range(ROUNDS):
        for product, start in PRODUCTS.items():
            with start(Flags(SLOTS, ctx_per_slot=2048, unified=True), model=model) as server:
                figures = asyncio.run(_take_turns(server.port, number))
            _record(rounds, product, figures)
            _print_figures(f"{name} round {number + 1}/{ROUNDS} {product}", figures)
    rounds["cached_share"]["bound"] = [SHARE_BOUND] * ROUNDS
    return {key: metric(products) for key, products in rounds.items()}


async def _take_turns(port: int, seed: int) -> Figures:
    """Run one client for each slot. Each client takes the chat whose turn is next."""
    chats = [Chat(f"{seed} {number}", PROMPT_WORDS) for number in range(CHATS)]
    await Chat("warm up", NEXT_WORDS).turn(port)

    async def answer_all(turns: int) -> list[Sample]:
        waiting, samples = deque(chats * turns), []

        async def client() -> None:
            while waiting:
                samples.append(await waiting.popleft().turn(port))

        await asyncio.gather(*(client() for _ in range(SLOTS)))
        return samples

    await answer_all(1)
    began = time.perf_counter()
    later = await answer_all(TURNS - 1)
    seconds = time.perf_counter() - began
    return {
        "ttft_p95_ms": 1000 * p95([sample.ttft for sample in later]),
        "cached_share": _cached_share(later),
        "output_tokens_per_s": sum(sample.tokens for sample in later) / seconds,
        "max_gap_ms": 1000 * max(gap for sample in later for gap in sample.gaps),
    }


def restart(name: str, model: str | None) -> dict[str, Metric]:
    """Return TTFTs and their ratios to the same round's warm and cold turns. A restart empties llama-server's cache."""
    rounds: dict[str, Rounds] = {}
    for number in range(ROUNDS):
        for product, measure in {"ours": _our_restarts, "llama_server": _llama_server_restart}.items():
            figures = measure(model, number)
            _record(rounds, product, figures)
            _print_figures(f"{name} round {number + 1}/{ROUNDS} {product}", figures)
    for phase in KEPT:
        for of, bound in ("warm", WARM_BOUND), ("cold", COLD_BOUND):
            rounds[f"{phase}_of_{of}"]["bound"] = [bound] * ROUNDS
    return {key: metric(products) for key, products in rounds.items()}


def _our_restarts(model: str | None, seed: int) -> Figures:
    """Measure one turn of all chats: cold, warm, after kill -9 of the worker, after a restart, and after an upgrade."""
    phase = partial(_phase, _long_chats(seed))
    WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        shutil.copytree(SERVER, Path(folder) / "release/llamaherd_server")
        limits = f"[limits]\nprompt_cache_dir = {json.dumps(f'{folder}/prompts')}\n"
        start = partial(servers.ours, LONG_FLAGS, limits, model=model)
        with start() as server:
            figures = phase(server, "cold") | phase(server, "warm")
            server.kill_worker()
            figures |= phase(server, "killed")
        with start() as server:
            figures |= phase(server, "restarted")
        with start(environment={"PYTHONPATH": f"{folder}/release"}) as server:
            figures |= phase(server, "upgraded")
    ttft = {name: figures[f"{name}_ttft_p95_ms"] for name in ("cold", "warm", *KEPT)}
    return figures | {f"{name}_of_{of}": ttft[name] / ttft[of] for name in KEPT for of in ("warm", "cold")}


def _llama_server_restart(model: str | None, seed: int) -> Figures:
    phase = partial(_phase, _long_chats(seed))
    with servers.llama_server(LONG_FLAGS, model=model) as server:
        figures = phase(server, "cold") | phase(server, "warm")
    with servers.llama_server(LONG_FLAGS, model=model) as server:
        return figures | phase(server, "restarted")


# Half as many slots as chats, so that even a warm turn finds its prompt in the cache and not in a slot.
LONG_FLAGS = Flags(LONG_CHATS // 2, ctx_per_slot=6144, unified=True)


def _long_chats(seed: int) -> list[Chat]:
    return [Chat(f"{seed} {number}", LONG_PROMPT_WORDS) for number in range(LONG_CHATS)]


def _phase(chats: list[Chat], server: Running, name: str) -> Figures:
    async def one_after_the_other() -> list[Sample]:
        await Chat("warm up", NEXT_WORDS).turn(server.port)
        return [await one.turn(server.port) for one in chats]

    samples = asyncio.run(one_after_the_other())
    return {
        f"{name}_ttft_p95_ms": 1000 * p95([sample.ttft for sample in samples]),
        f"{name}_cached_share": _cached_share(samples),
    }


def _cached_share(samples: list[Sample]) -> float:
    return sum(sample.cached_tokens for sample in samples) / sum(sample.prompt_tokens for sample in samples)


def _record(rounds: dict[str, Rounds], product: str, figures: Figures) -> None:
    for key, figure in figures.items():
        rounds.setdefault(key, {}).setdefault(product, []).append(figure)


def _print_figures(what: str, figures: Figures) -> None:
    print(what, "  ".join(f"{key} {figure:.4g}" for key, figure in figures.items()), flush=True)
