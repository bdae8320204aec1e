"""Our server beside llama-server and llama-cpp-python's example server: same build, same GGUF, same flags.

Each round runs all products one after the other with new prompts, so that a slow minute affects all of them.
A product with two KV layouts runs in both, and the better one (by tokens per second) counts.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count
from statistics import median, quantiles

from bench import servers
from bench.client import Sample, complete
from bench.servers import Flags, Running
from bench.table import Metric, Result, metric

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "5"))
PRODUCTS: dict[str, tuple[Callable[[Flags], AbstractContextManager[Running]], tuple[bool, ...]]] = {
    "ours": (servers.ours, (True, False)),
    "llama_server": (servers.llama_server, (True, False)),
    "lcp_example": (servers.lcp_example, (True,)),
}
WORDS = (
    "river stone market winter engine garden signal copper window letter harbour season paper morning bridge "
    "teacher island silver machine forest history kitchen music number ocean pencil question road summer table"
).split()
Figures = dict[str, float]
Ask = Callable[[int, str, int], Coroutine[None, None, Sample]]


@dataclass(frozen=True)
class Scenario:
    """One load. `load` takes a port and a seed and returns the samples that count; `ask` sends one of its requests."""

    flags: Flags
    load: Callable[[int, int], Coroutine[None, None, list[Sample]]]
    ask: Ask = complete


def words(generator: random.Random, count: int) -> str:
    return " ".join(generator.choices(WORDS, k=count))


def distinct(streams: int, requests_per_stream: int = 2, apart_s: float = 0, ask: Ask = complete) -> Scenario:
    """About 100 tokens in, 64 out, temperature 0.8. Each stream sends its next request when the previous one ends.

    Each stream starts `apart_s` seconds after the one before.
    """

    async def load(port: int, seed: int) -> list[Sample]:
        generator = random.Random(seed)

        async def stream(number: int, prompts: list[str]) -> list[Sample]:
            await asyncio.sleep(number * apart_s)
            return [await ask(port, prompt, 64) for prompt in prompts]

        batches = [[words(generator, 85) for _ in range(requests_per_stream)] for _ in range(streams)]
        return [sample for batch in await asyncio.gather(*map(stream, count(), batches)) for sample in batch]

    return Scenario(Flags(parallel=streams, ctx_per_slot=512, unified=True), load, ask)


def shared_prefix(streams: int) -> Scenario:
    """A system prompt of about 512 tokens, which is new in each round, sent by all streams at once: a cold cache."""

    async def load(port: int, seed: int) -> list[Sample]:
        generator = random.Random(seed)
        system = words(generator, 440)
        prompts = [f"{system}\n\n{words(generator, 12)}" for _ in range(streams)]
        return list(await asyncio.gather(*(complete(port, prompt, 64) for prompt in prompts)))

    return Scenario(Flags(parallel=streams, ctx_per_slot=1024, unified=True), load)


def long_arrival(streams: int) -> Scenario:
    """A prompt of about 4096 tokens arrives while other streams are running, whose samples count."""

    async def load(port: int, seed: int) -> list[Sample]:
        generator = random.Random(seed)
        running = [asyncio.create_task(complete(port, words(generator, 20), 160)) for _ in range(streams)]
        await asyncio.sleep(3)
        await complete(port, words(generator, 3500), 4)
        return list(await asyncio.gather(*running))

    return Scenario(Flags(parallel=streams + 1, ctx_per_slot=4608, unified=True), load)


SCENARIOS = {
    "distinct_1": distinct(1, requests_per_stream=4),
    "distinct_8": distinct(8),
    "distinct_16": distinct(16),
    "shared_prefix_16": shared_prefix(16),
    "long_arrival_8": long_arrival(8),
}


def run() -> Result:
    wanted = os.environ.get("BENCH_SCENARIOS", ",".join(SCENARIOS)).split(",")
    return {name: run_scenario(name, SCENARIOS[name]) for name in wanted}


def run_scenario(name: str, scenario: Scenario) -> dict[str, Metric]:
    rounds: dict[str, list[Figures]] = {}
    for number in range(ROUNDS):
        for product, (start, layouts) in PRODUCTS.items():
            for unified in layouts:
                variant = f"{product} {'unified' if unified else 'split'}"
                flags = Flags(scenario.flags.parallel, scenario.flags.ctx_per_slot, unified)
                figures = measure(start, flags, scenario, seed=number)
                rounds.setdefault(variant, []).append(figures)
                print_figures(f"{name} round {number + 1}/{ROUNDS} {variant:<22}", figures)
    best = {product: better_layout(rounds, product) for product in PRODUCTS}
    return {
        key: metric(
            {product: [figures[key] for figures in best[product]] for product in PRODUCTS if key in best[product][0]}
        )
        for key in best["ours"][0]
    }


def print_figures(what: str, figures: Figures) -> None:
    print(
        f"{what}{figures['output_tokens_per_s']:7.1f} tokens/s  TTFT p95 {figures['ttft_p95_ms']:7.0f} ms  "
        f"ITL p95 {figures['itl_p95_ms']:5.0f} ms  largest gap {figures['max_gap_ms']:6.0f} ms",
        flush=True,
    )


def measure(
    start: Callable[[Flags], AbstractContextManager[Running]], flags: Flags, scenario: Scenario, seed: int
) -> Figures:
    with start(flags) as server:
        asyncio.run(scenario.ask(server.port, "warm up", 8))
        began = time.perf_counter()
        samples = asyncio.run(scenario.load(server.port, seed))
        seconds = time.perf_counter() - began
        gaps = [gap for sample in samples for gap in sample.gaps]
        figures = {
            "output_tokens_per_s": sum(sample.tokens for sample in samples) / seconds,
            "ttft_p95_ms": 1000 * p95([sample.ttft for sample in samples]),
            "itl_p95_ms": 1000 * p95(gaps),
            "max_gap_ms": 1000 * max(gaps),
            "rss_mib": server.rss_mib,
        }
        if start is servers.ours:
            figures["scheduler_share"] = scheduler_share(server.metrics())
        return figures


def p95(values: list[float]) -> float:
    return quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]


def better_layout(rounds: dict[str, list[Figures]], product: str) -> list[Figures]:
    variants = [figures for name, figures in rounds.items() if name.startswith(f"{product} ")]
    return max(variants, key=lambda figures: median(figure["output_tokens_per_s"] for figure in figures))


def scheduler_share(page: str) -> float:
    """Return the share of the worker's own time in the time of all steps, from the server's histograms."""
    overhead = step_s(page, "overhead")
    return overhead / (overhead + step_s(page, "decode") + step_s(page, "sample"))


def step_s(page: str, part: str) -> float:
    """Return the seconds that all steps have spent in `part`."""
    pattern = rf"^llamaherd_step_{part}_seconds_sum(?:{{[^}}]*}})? (\S+)$"
    return sum(float(value) for value in re.findall(pattern, page, re.MULTILINE))
