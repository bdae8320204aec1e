"""Cost of the host's own work, which dominates where a step is fast, as on a GPU; compared with llama-server.

The model is one small layer with a real vocabulary, computed by one thread. Both servers run all the time and get the
same load in turns, with new prompts in each round.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import time

import uvloop

from bench import servers
from bench.frontend import complete
from bench.servers import Flags, Running
from bench.serving import ROUNDS, Figures, step_s, words
from bench.table import Metric, Result, metric
from tests.random_models import RandomModel

VOCABULARIES = {"49k": 49_152, "152k": 151_936}  # SmolLM2's and Qwen's
# Concurrent streams, tokens of each, and the minimum ratio of tokens/s to llama-server's for each vocabulary.
STREAMS = {1: (1500, (1.0, 1.0)), 8: (600, (1.4, 1.15)), 32: (300, (1.4, 1.3))}
_USAGE = re.compile(rb'"completion_tokens": ?(\d+)')


def run() -> Result:
    names = [f"{vocabulary}_{streams}" for vocabulary in VOCABULARIES for streams in STREAMS]
    wanted = os.environ.get("BENCH_SCENARIOS", ",".join(names)).split(",")
    return {name: run_scenario(name) for name in wanted}


def run_scenario(name: str) -> dict[str, Metric]:
    vocabulary, _, streams = name.partition("_")
    tokens, bounds = STREAMS[int(streams)]
    model = str(RandomModel("dense", layers=1, width=64, vocab=VOCABULARIES[vocabulary]).path())
    flags = Flags(parallel=int(streams), ctx_per_slot=2048, unified=True, threads=1)
    rounds: dict[str, list[Figures]] = {"ours": [], "llama_server": []}
    with servers.ours(flags, model=model) as ours, servers.llama_server(flags, model=model) as peer:
        for server in (ours, peer):
            uvloop.run(load(server, int(streams), 32, seed=-1))
        for number in range(ROUNDS):
            for product, server in {"ours": ours, "llama_server": peer}.items():
                rounds[product].append(measure(server, int(streams), tokens, number, ours=server is ours))
                print(f"{name} round {number + 1}/{ROUNDS} {product:<13}{rounds[product][-1]}", flush=True)
    result = {
        key: metric({product: [one[key] for one in seen] for product, seen in rounds.items() if key in seen[0]})
        for key in rounds["ours"][0]
    }
    bound = bounds[[*VOCABULARIES].index(vocabulary)]
    result["output_tokens_per_s"]["bound"] = bound
    return result


def measure(server: Running, streams: int, tokens: int, seed: int, *, ours: bool) -> Figures:
    """Measure one load. CPU time includes the server's children; `outside` is the wall time not in llama_decode."""
    page, cpu, began = server.metrics() if ours else "", server.cpu_s, time.perf_counter()
    count = uvloop.run(load(server, streams, tokens, seed))
    took, cpu = time.perf_counter() - began, server.cpu_s - cpu
    figures = {"output_tokens_per_s": count / took, "cpu_us_per_token": 1e6 * cpu / count}
    if ours:
        after = server.metrics()
        spent = {part: step_s(after, part) - step_s(page, part) for part in ("decode", "sample", "overhead")}
        figures["outside_decode_us_per_token"] = 1e6 * (took - spent["decode"]) / count
        figures |= {f"{part}_us_per_token": 1e6 * seconds / count for part, seconds in spent.items()}
    return {name: round(figure, 1) for name, figure in figures.items()}


async def load(server: Running, streams: int, tokens: int, seed: int) -> int:
    """Run `streams` completions at once, sampled with llama-server's defaults, and return the number of tokens."""
    generator = random.Random(seed)
    bodies = [
        {"prompt": words(generator, 8), "max_tokens": tokens, "stream_options": {"include_usage": True}}
        for _ in range(streams)
    ]
    done = await asyncio.gather(*(complete(server.port, body) for body in bodies))
    usages = [_USAGE.search(one.data) for one in done]
    if not all(usages):
        raise RuntimeError(f"no full stream: {bytes(done[0].data[-500:])!r}")
    return sum(int(usage[1]) for usage in usages if usage)
