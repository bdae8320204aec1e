"""Replays a recorded trace: when each request arrived and how long its prompt and answer were.

It reads the formats of guidellm and aiperf: Mooncake's JSON lines (timestamp in ms, input_length, output_length,
hash_ids: ids of blocks that prompts share, of block_size tokens, 512 by default), and the CSV files of Azure's LLM
inference traces (TIMESTAMP, ContextTokens, GeneratedTokens) and of BurstGPT (Timestamp in s, Request tokens, Response
tokens).
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import msgspec
from msgspec import Struct

from llamaherd_loadtest.rng import seeded
from llamaherd_loadtest.workload import Calibration, Lengths, Prompts, Workload, text


class TraceRequest(Struct, frozen=True):
    """One request: seconds since the trace's first, lengths in tokens, and the ids of the blocks that its prompt starts
    with, of `block_tokens` each."""

    at: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    block_tokens: int = 512


class _Mooncake(Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()
    block_size: int = 512


class Trace(Struct, frozen=True):
    """Requests by arrival; `speed` 2 replays them in half the time."""

    requests: Sequence[TraceRequest]
    speed: float = 1.0

    def offsets(self) -> Iterator[float]:
        """Yield seconds from the start of the run."""
        return (request.at / self.speed for request in self.requests)

    @property
    def longest(self) -> int:
        """Context of the longest request, in tokens."""
        return max(request.prompt_tokens + request.output_tokens for request in self.requests)


class TracePrompts(Prompts):
    """Fresh prompts with the lengths of a trace; its requests' shared blocks are shared here too."""

    def __init__(self, trace: Trace, *, model: str, seed: int, calibration: Calibration) -> None:
        lengths = Lengths(1)  # never drawn from
        workload = Workload(name="trace", description="", prompt=lengths, output=lengths)
        super().__init__(workload, model=model, seed=seed, calibration=calibration)
        self._trace = trace

    def _first(self, index: int) -> tuple[str, int]:
        rng = seeded(self._seed, index)
        request = self._trace.requests[index % len(self._trace.requests)]
        words = self._calibration.words(request.prompt_tokens)
        block_words = round(request.block_tokens / self._calibration.per_word)
        parts = []
        for block in request.blocks if index >= 0 else ():  # warm-up requests share nothing
            parts.append(text(seeded(self._seed, "block", block), min(block_words, words)))
            words -= min(block_words, words)
        return " ".join(filter(None, [*parts, text(rng, words)])), request.output_tokens


def read_trace(path: Path, speed: float = 1.0) -> Trace:
    """Read a trace. Raises ValueError for a malformed line, OSError if the file cannot be read."""
    if speed <= 0:
        raise ValueError(f"invalid trace speed {speed:g}: must be above 0")
    requests = list(_mooncake(path) if path.suffix == ".jsonl" else _csv(path))
    if not requests:
        raise ValueError(f"trace {path} has no requests")
    first = min(request.at for request in requests)
    since = (msgspec.structs.replace(request, at=request.at - first) for request in requests)
    return Trace(sorted(since, key=lambda request: request.at), speed)


def _mooncake(path: Path) -> Iterator[TraceRequest]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = msgspec.json.decode(line, type=_Mooncake)
        except msgspec.MsgspecError as error:
            raise ValueError(f"trace {path}, line {number}: {error}") from error
        yield TraceRequest(row.timestamp / 1000, row.input_length, row.output_length, row.hash_ids, row.block_size)


def _csv(path: Path) -> Iterator[TraceRequest]:
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            try:
                if "ContextTokens" in row:
                    at = datetime.fromisoformat(row["TIMESTAMP"]).timestamp()
                    yield TraceRequest(at, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
                else:
                    yield TraceRequest(float(row["Timestamp"]), int(row["Request tokens"]), int(row["Response tokens"]))
            except KeyError as error:
                raise ValueError(
                    f"trace {path} has no column {error}: supported are Azure's and BurstGPT's .csv, Mooncake's .jsonl"
                ) from error
            except (ValueError, TypeError) as error:
                raise ValueError(f"trace {path}, line {number}: {error}") from error
