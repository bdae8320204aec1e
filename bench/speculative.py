"""Speculative decoding compared with llama-server's, for answers that repeat their prompt (`edit`) or do not (`chat`).

`edit`: SmolLM2 greedily continues code of which the prompt repeats the first lines. `chat`: sampled answers to
questions. All servers run all the time and get the same load in turns, with new prompts in each round.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench import servers
from bench.client import complete
from bench.servers import Flags, Running
from bench.serving import ROUNDS, WORDS, Figures, step_s
from bench.table import Metric, Result, metric
from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.wire.protocol import WorkerConfig

STREAMS = {1: 192, 4: 128, 16: 64}  # tokens of each stream
LINES = 24  # lines of code in a prompt of `edit`
# Minimum ratio of tokens/s to that without drafts; for `edit` with one stream also to llama-server's best type.
BOUNDS = {"edit_1": 1.5}
NEVER_BELOW, BEST_TYPE = 0.97, 1.0
TYPES = ("ngram-simple", "ngram-map-k", "ngram-mod")
STEPS = (1, 2, 4, 8, 16, 32, 64)  # tokens in one step


def run() -> Result:
    names = [f"{kind}_{streams}" for kind in ("edit", "chat") for streams in STREAMS]
    wanted = os.environ.get("BENCH_SCENARIOS", ",".join([*names, "step"])).split(",")
    return {name: step_times() if name == "step" else run_scenario(name) for name in wanted}


def run_scenario(name: str) -> dict[str, Metric]:
    kind, _, number = name.partition("_")
    streams = int(number)
    flags = Flags(parallel=streams, ctx_per_slot=1024, unified=True)
    rounds: dict[str, list[Figures]] = {}
    with ExitStack() as stack:
        running = {
            "ours": stack.enter_context(servers.ours(flags, 'speculative = "auto"\n')),
            "off": stack.enter_context(servers.ours(flags)),
            "llama_server_off": stack.enter_context(servers.llama_server(flags)),
            **{
                f"llama_server_{one}": stack.enter_context(servers.llama_server(flags, "--spec-type", one))
                for one in TYPES
            },
        }
        for server in running.values():
            asyncio.run(load(server, kind, streams, 8, seed=-1))
        for turn in range(ROUNDS):
            for product, server in running.items():
                figures = measure(server, kind, streams, turn, ours=not product.startswith("llama"))
                rounds.setdefault(product, []).append(figures)
                print(f"{name} round {turn + 1}/{ROUNDS} {product:<25}{figures}", flush=True)
    speed = metric({product: [one["output_tokens_per_s"] for one in seen] for product, seen in rounds.items()})
    best = max(TYPES, key=lambda one: speed[f"llama_server_{one}"])
    speed["bound_of_off"] = BOUNDS.get(name, NEVER_BELOW)
    if name in BOUNDS:
        speed[f"bound_of_{best}"] = BEST_TYPE
    more = {key: {"ours": median(one[key] for one in rounds["ours"]), "ratio": {}} for key in ("accepted", "drafted")}
    return {"output_tokens_per_s": speed, **more}


def measure(server: Running, kind: str, streams: int, seed: int, *, ours: bool) -> Figures:
    """Measure one load. `drafted`: tokens drafted for each output token; `accepted`: the acceptance rate."""
    before, began = server.metrics() if ours else "", time.perf_counter()
    count = asyncio.run(load(server, kind, streams, STREAMS[streams], seed))
    figures = {"output_tokens_per_s": count / (time.perf_counter() - began)}
    if ours:
        after = server.metrics()
        drafted, accepted = (total(after, name) - total(before, name) for name in ("drafted", "accepted"))
        figures |= {"drafted": drafted / count, "accepted": accepted / max(drafted, 1)}
        figures["decode_ms_per_token"] = 1000 * (step_s(after, "decode") - step_s(before, "decode")) / count
    return {name: round(figure, 3) for name, figure in figures.items()}


def total(page: str, name: str) -> float:
    lines = (line for line in page.splitlines() if line.startswith(f"llamaherd_{name}_tokens_total"))
    return sum(float(line.rpartition(" ")[2]) for line in lines)


async def load(server: Running, kind: str, streams: int, tokens: int, seed: int) -> int:
    """Run `streams` completions at once and return the number of tokens."""
    rng = random.Random(seed)
    prompt, temperature = (edit, 0.0) if kind == "edit" else (chat, 0.8)
    jobs = (complete(server.port, prompt(rng), tokens, temperature) for _ in range(streams))
    return sum(sample.tokens for sample in await asyncio.gather(*jobs))


def edit(rng: random.Random) -> str:
    """Return a prompt of code followed by its first lines again."""
    lines = rng.choice(sorted(Path(__file__).parent.glob("*.py"))).read_text().splitlines()
    start = rng.randrange(max(1, len(lines) - LINES))
    code = lines[start : start + LINES]
    return "\n".join([*code, "", *code[: LINES // 4], ""])


def chat(rng: random.Random) -> str:
    first, second = rng.sample(WORDS, 2)
    return f"<|im_start|>user\nWhat has a {first} to do with a {second}?<|im_end|>\n<|im_start|>assistant\n"


@dataclass
class One:
    """The only sequence of a context, with the attributes that Batch needs."""

    tokens: list[int]
    computed: int = 0
    slot: int = 0
    draft: list[int] = field(default_factory=list)

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed


def step_times() -> dict[str, Metric]:
    """Return the milliseconds of a step by its number of tokens, all of one sequence, and their ratio to one token."""
    from llamaherd_server.worker import lib as llama  # noqa: PLC0415 (llama_cpp is not there in every group)
    from llamaherd_server.worker.batch import Batch  # noqa: PLC0415 (loads llama.cpp)
    from llamaherd_server.worker.context import new_context  # noqa: PLC0415 (llama_cpp is not there in every group)
    from llamaherd_server.worker.model import Model  # noqa: PLC0415 (llama_cpp is not there in every group)

    threads = Flags(1, 1024, unified=True).threads
    settings = EngineSettings(parallel=1, ctx_per_slot=1024, threads=threads, threads_batch=threads)
    lib = llama.load()
    config = WorkerConfig(path=os.environ["LLAMAHERD_TEST_MODEL"], settings=settings)
    model = Model(lib, llama.Log(lib), config, lambda _: None)
    context: Any = new_context(model, settings, n_seq_max=1, n_outputs_max=max(STEPS))
    batch, tokens = Batch(lib, settings.batch), list(range(1000, 1256 + max(STEPS)))
    seconds: dict[int, list[float]] = {count: [] for count in STEPS}

    def decode(computed: int, count: int) -> float:
        batch.fill([(One(tokens[: computed + count], computed), count)], output_from=0)
        began = time.perf_counter()
        lib.llama_decode(context, batch.native)
        lib.llama_synchronize(context)
        return time.perf_counter() - began

    batch.fill([(One(tokens[:256]), 256)])
    lib.llama_decode(context, batch.native)
    for _ in range(4 * ROUNDS):
        for count in STEPS:
            seconds[count].append(decode(256, count))
            lib.llama_memory_seq_rm(lib.llama_get_memory(context), 0, 256, -1)
    one = min(seconds[1])
    return {
        f"{count}_tokens": {"ours": round(1000 * min(seen), 2), "of_one": round(min(seen) / one, 2), "ratio": {}}
        for count, seen in seconds.items()
    }
