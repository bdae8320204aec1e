"""A batch with a preemptible key together with chats: how long chats wait, and how much the batch gets.

`chats`: a chat of about 100 tokens every 2 s on average, 24 tokens out. `batch`: three times as many concurrent
requests as slots, each of about 200 tokens in and 64 out, without a pause. Each runs alone, then both together. TTFT
p95 of chats with the batch may be 1.2 x that of chats alone. With chats, the batch should reach 0.85 of its speed alone
in the share of the time that chats alone leave idle.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import time

from bench import servers
from bench.client import Sample, complete
from bench.servers import WORK, Flags
from bench.serving import ROUNDS, p95, words
from bench.table import Result, Rounds, metric

SLOTS, SECONDS = 4, float(os.environ.get("BENCH_SECONDS", "60"))
CHAT_EVERY_S, CHAT_WORDS, CHAT_TOKENS = 2.0, 80, 24
BATCH_WORDS, BATCH_TOKENS = 160, 64
KEYS = ("chats", "batch")


def run() -> Result:
    rounds: dict[str, Rounds] = {}
    for number in range(ROUNDS):
        with servers.ours(Flags(SLOTS, ctx_per_slot=1024, unified=True), _keys()) as server:
            chats, busy_s = asyncio.run(_chats(server.port, number, "alone"))
            batch = asyncio.run(_batch(server.port, number, SECONDS))
            beside, tokens = asyncio.run(_both(server.port, number))
        left = batch * (1 - busy_s / SECONDS)
        measured = {
            "chat_ttft_p95_ms": {"ours": beside * 1e3, "alone": chats * 1e3},
            "batch_tokens_per_s": {"ours": tokens / SECONDS, "alone": batch / SECONDS, "left": left / SECONDS},
        }
        for name, figures in measured.items():
            for product, value in figures.items():
                rounds.setdefault(name, {}).setdefault(product, []).append(value)
        print(f"priorities round {number + 1}/{ROUNDS}: {measured}", flush=True)
    return {"chats_beside_a_batch": {name: metric(one) for name, one in rounds.items()}}


def _keys() -> str:
    WORK.mkdir(parents=True, exist_ok=True)
    path = WORK / "priorities-keys.toml"
    lines = [
        f'[[keys]]\nname = "{name}"\nsha256 = "{hashlib.sha256(name.encode()).hexdigest()}"\n'
        f"preemptible = {str(name == 'batch').lower()}\n"
        for name in KEYS
    ]
    path.write_text("".join(lines))
    return f'[auth]\nkeys_file = "{path}"\n[limits]\nqueue_timeout_s = 600\n'


async def _chats(port: int, seed: int, phase: str) -> tuple[float, float]:
    """Return TTFT p95 in seconds, and for how many seconds of SECONDS any chat was running, of open arrivals.

    Chats arrive at the same times in each phase, with different prompts.
    """
    rng, texts = random.Random(seed), random.Random(f"{seed} {phase}")
    began, at, tasks = time.perf_counter(), 0.0, []

    async def one(after: float, prompt: str) -> Sample:
        await asyncio.sleep(after)
        return await complete(port, prompt, CHAT_TOKENS, key="chats")

    while (at := at + rng.expovariate(1 / CHAT_EVERY_S)) < SECONDS:
        tasks.append(one(at, words(texts, CHAT_WORDS)))
    samples = await asyncio.gather(*tasks)
    spans = sorted((sample.sent - began, sample.arrivals[-1] - began) for sample in samples)
    busy, until = 0.0, 0.0
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return p95([sample.ttft for sample in samples]), min(busy, SECONDS)


async def _batch(port: int, seed: int, seconds: float) -> float:
    """Return the number of batch tokens that arrived within `seconds`."""
    came, until = 0, time.perf_counter() + seconds

    async def client(number: int) -> None:
        nonlocal came
        rng = random.Random(f"{seed} {number}")
        while time.perf_counter() < until:
            sample = await complete(port, words(rng, BATCH_WORDS), BATCH_TOKENS, key="batch")
            came += sum(arrival < until for arrival in sample.arrivals)

    await asyncio.gather(*(client(number) for number in range(3 * SLOTS)))
    return came


async def _both(port: int, seed: int) -> tuple[float, float]:
    batch = asyncio.create_task(_batch(port, seed + 100, SECONDS))
    (ttft, _), tokens = await asyncio.gather(_chats(port, seed, "beside"), batch)
    return ttft, tokens
