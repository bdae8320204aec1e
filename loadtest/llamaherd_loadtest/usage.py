"""Derives a workload from a server's log: `python -m llamaherd_loadtest.usage LOG --out FOLDER`.

LOG holds the server's log lines (JSON), one per request and without text. FOLDER receives trace.jsonl, which replays
the requests with their original timing (Mooncake's format), and workload.yml, which has the same distributions of
lengths, for load tests and the tuner.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any

import msgspec
from msgspec import Struct

from llamaherd_loadtest.files import write_whole

BLOCK_CHARS = 256  # per prefix hash in the server's log
_MIN_REQUESTS = 20  # fewer do not show how lengths are distributed
_TURNS_SHARE = 0.2  # a workload gets turns if at least this share of requests continues an earlier one


class Request(Struct):
    """One log line. `timestamp` is the request's end (ISO format), `ms` its duration; lengths are in tokens."""

    timestamp: datetime
    event: str = ""
    status: int = 0
    ms: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_chars: int = 0
    prefixes: tuple[int, ...] = ()

    @property
    def arrived(self) -> float:
        """Unix time in seconds."""
        return self.timestamp.timestamp() - self.ms / 1000


def read_requests(path: Path) -> list[Request]:
    """Return the answered requests by arrival time. Raises OSError, and ValueError if there are too few."""
    found = []
    for line in path.read_bytes().splitlines():
        try:
            one = msgspec.json.decode(line, type=Request)
        except msgspec.MsgspecError:  # other lines of a journal
            continue
        if one.event == "request" and one.status == 200 and one.prompt_tokens and one.completion_tokens:
            found.append(one)
    if len(found) < _MIN_REQUESTS:
        raise ValueError(f"{path} has {len(found)} answered requests, {_MIN_REQUESTS} are needed: give a longer log")
    return sorted(found, key=lambda one: one.arrived)


def trace_lines(requests: Sequence[Request]) -> Iterable[dict[str, Any]]:
    """Yield lines in Mooncake's format. Blocks that only one request has are left out."""
    count = Counter(one for request in requests for one in request.prefixes)
    size = _block_tokens(requests)
    for request in requests:
        shared = [*itertools.takewhile(lambda one: count[one] > 1, request.prefixes)]
        yield {
            "timestamp": round(1000 * (request.arrived - requests[0].arrived)),
            "input_length": request.prompt_tokens,
            "output_length": request.completion_tokens,
        } | ({"hash_ids": shared, "block_size": size} if shared else {})


def workload(requests: Sequence[Request], name: str) -> dict[str, Any]:
    """Return a workload's fields. Requests that repeat and extend an earlier prompt become turns of a conversation."""
    size, chats = _block_tokens(requests), conversations(requests)
    firsts = [chat[0] for chat in chats]
    first_blocks = Counter(block for one in firsts for block in one.prefixes)
    shared = sum(count > len(firsts) / 2 for count in first_blocks.values()) * size
    pairs = [pair for chat in chats for pair in itertools.pairwise(chat)]
    has_turns = len(pairs) >= _TURNS_SHARE * len(requests)
    prompts = [one.prompt_tokens for one in (firsts if has_turns else requests)]
    first, last = (f"{one.timestamp:%Y-%m-%d %H:%M}" for one in (requests[0], requests[-1]))
    fields: dict[str, Any] = {
        "name": name,
        "description": f"{len(requests)} requests from {first} to {last} UTC",
        "prompt": _lengths(prompts),
        "output": _lengths([one.completion_tokens for one in requests]),
        "shared_prefix": min(shared, min(prompts) - 1) if shared else 0,
    }
    if has_turns:
        added = [max(1, b.prompt_tokens - a.prompt_tokens - a.completion_tokens) for a, b in pairs]
        fields["turns"] = {"count": _lengths([len(chat) for chat in chats]), "added": _lengths(added)}
    return fields


def conversations(requests: Sequence[Request]) -> list[list[Request]]:
    """Group requests by conversation. A conversation has a block that no other requests have, and each of its requests
    continues the one before; requests that share a system prompt's blocks do not continue each other."""
    by_block: dict[int, list[Request]] = {}
    for request in requests:
        for block in request.prefixes:
            by_block.setdefault(block, []).append(request)
    own = {block for block, some in by_block.items() if all(_continues(*pair) for pair in itertools.pairwise(some))}
    found: dict[int, list[Request]] = {}
    for number, request in enumerate(requests):
        key = next((block for block in request.prefixes if block in own), -1 - number)
        found.setdefault(key, []).append(request)
    return [*found.values()]


def _continues(one: Request, other: Request) -> bool:
    """Return whether the prompt of `other` repeats all whole blocks of `one` and has more."""
    length = len(one.prefixes)
    return len(other.prefixes) > length and other.prefixes[length - 1] == one.prefixes[-1]


def _block_tokens(requests: Sequence[Request]) -> int:
    """Tokens per block, from the average characters per token of the prompts."""
    chars = sum(one.prompt_chars for one in requests)
    tokens = sum(one.prompt_tokens for one in requests if one.prompt_chars)
    return max(1, round(BLOCK_CHARS * tokens / chars)) if chars else BLOCK_CHARS // 4


def _lengths(values: Sequence[int]) -> dict[str, Any]:
    """Return a log-normal distribution with the same median, spread and range."""
    logs = [math.log(value) for value in values]
    middle = round(median(values))
    return {"median": middle, "sigma": round(pstdev(logs, fmean(logs)), 3), "min": min(values), "max": max(values)}


def main() -> int:
    """Write both files and print the workload; on failure, return exit status 2 and print one line."""
    parser = argparse.ArgumentParser(prog="python -m llamaherd_loadtest.usage", description=__doc__)
    parser.add_argument("log", type=Path, help="file with the server's log lines")
    parser.add_argument("--name", default="live", help="the workload's name (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for trace.jsonl and workload.yml")
    args = parser.parse_args()
    try:
        requests = read_requests(args.log)
        fields = msgspec.yaml.encode(workload(requests, args.name))
        args.out.mkdir(parents=True, exist_ok=True)
        write_whole(args.out / "trace.jsonl", b"".join(msgspec.json.encode(x) + b"\n" for x in trace_lines(requests)))
        write_whole(args.out / "workload.yml", fields)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"usage: {error}\n")
        return 2
    sys.stdout.write(fields.decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
