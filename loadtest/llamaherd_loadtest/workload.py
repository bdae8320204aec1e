"""Workloads: files that give the lengths of prompts and answers, and fresh prompts of those lengths."""

from __future__ import annotations

import math
import random
from collections.abc import Generator
from functools import cache
from importlib import resources
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any, Literal

import msgspec
from msgspec import Struct

from llamaherd_loadtest.rng import seeded

_FILES = resources.files("llamaherd_loadtest") / "workloads"
_SHORTEST, _LONGEST = 0.001, 0.999  # lengths are drawn between these quantiles

Conversation = Generator[bytes, str, None]
"""The request bodies of a conversation. To get the next one, send the generator the answer to the one before."""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": {what: {"type": "string"}}, "required": [what]},
        },
    }
    for name, what, description in (
        ("search", "query", "Search the documents and return the passages that fit best."),
        ("read_file", "path", "Return the text of a file."),
        ("run", "command", "Run a shell command and return its output."),
    )
]
"""The tools in an agent's requests, in OpenAI's form."""


class Lengths(Struct, frozen=True, forbid_unknown_fields=True):
    """A distribution of lengths in tokens, clamped to [min, max]; with `sigma` 0 all are the median.

    `sigma` is that of the logarithm if `distribution` is lognormal, and in tokens if it is normal. Uniform lengths lie
    between `min` and `max`.
    """

    median: int
    distribution: Literal["lognormal", "normal", "uniform"] = "lognormal"
    sigma: float = 0.0
    min: int = 1
    max: int = 1 << 20

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.median <= self.max or self.sigma < 0:
            raise ValueError(f"lengths need 1 <= min <= median <= max and sigma >= 0, not {self}")

    def at(self, p: float) -> int:
        """The p-quantile in tokens."""
        if self.distribution == "uniform":
            return round(self.min + p * (self.max - self.min))
        spread = self.sigma * NormalDist().inv_cdf(p)
        raw = self.median * math.exp(spread) if self.distribution == "lognormal" else self.median + spread
        return round(min(max(raw, self.min), self.max))

    @property
    def mean(self) -> float:
        """The mean in tokens."""
        return fmean(self.at((n + 0.5) / 100) for n in range(100))


class Turns(Struct, frozen=True, forbid_unknown_fields=True):
    """How a conversation continues: each of its `count` requests repeats everything before it, with the actual answers.

    `added` is the length of what each request adds. With `tools`, requests carry tool definitions and the addition is a
    tool's result; without, it is a user's message.
    """

    count: Lengths
    added: Lengths
    tools: bool = False


class Workload(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What clients request. Prompt lengths are as the server counts them, chat template included.

    The first `shared_prefix` tokens of each prompt are the same throughout a run (a system prompt); the rest is fresh.
    `instruction` ends each prompt: at its start it would be another shared prefix.
    """

    name: str
    description: str
    prompt: Lengths
    output: Lengths
    shared_prefix: int = 0
    instruction: str = ""
    ignore_eos: bool = True  # answers of the requested length, so that settings are compared on equal work
    turns: Turns | None = None

    @property
    def need(self) -> int:
        """Context that a request needs at the 99th percentile, in tokens."""
        return self._context(0.99)

    @property
    def longest(self) -> int:
        """Context of the longest possible request, in tokens."""
        return self._context(_LONGEST)

    def _context(self, p: float) -> int:
        turns = self.turns.count.at(p) if self.turns else 1
        added = self.turns.added.at(p) if self.turns else 0
        return self.prompt.at(p) + (turns - 1) * added + turns * self.output.at(p)

    @property
    def mean_tokens(self) -> dict[str, int]:
        """Mean tokens of the prompts and answers of all requests; the prompts of a conversation grow with its turns."""
        more = (self.turns.count.mean - 1) / 2 * (self.turns.added.mean + self.output.mean) if self.turns else 0
        return {"prompt": round(self.prompt.mean + more), "output": round(self.output.mean)}

    @property
    def extra(self) -> dict[str, Any]:
        """Fields of its requests besides messages and lengths."""
        tools = {"tools": TOOLS} if self.turns and self.turns.tools else {}
        return tools | ({"ignore_eos": True} if self.ignore_eos else {})

    def with_output(self, max_tokens: int) -> Workload:
        """Return a copy with answers of `max_tokens`; 0 changes nothing."""
        return msgspec.structs.replace(self, output=Lengths(max_tokens)) if max_tokens else self

    def with_prompt(self, tokens: int) -> Workload:
        """Return a copy with prompts of `tokens`; 0 changes nothing."""
        return msgspec.structs.replace(self, prompt=Lengths(tokens)) if tokens else self


class Calibration(Struct, frozen=True):
    """How many tokens the server's tokenizer makes of our words: tokens = overhead + per_word * words.

    `timings`: requests must ask for timings. llama-server always sends them; other servers do not know the field.
    """

    per_word: float
    overhead: float
    timings: bool = False

    def words(self, tokens: int) -> int:
        """Return how many words make a prompt of about `tokens` tokens."""
        return max(1, round((tokens - self.overhead) / self.per_word))


class Prompts:
    """The requests of one run, a function of seed and index: fresh for a fresh seed."""

    def __init__(self, workload: Workload, *, model: str, seed: int, calibration: Calibration) -> None:
        self._workload, self._model, self._seed, self._calibration = workload, model, seed, calibration
        self._prefix = ""
        if workload.shared_prefix:
            words = round(workload.shared_prefix / calibration.per_word)
            self._prefix = text(seeded(seed, "shared"), words)

    @property
    def needs_answers(self) -> bool:
        """Whether later requests of a conversation contain the answers to earlier ones."""
        return self._workload.turns is not None

    def request(self, index: int, output_share: float = 1.0) -> bytes:
        """Return the body of conversation `index`'s first request; `output_share` shortens its answer (for warm-up)."""
        return next(self.conversation(index, output_share))

    def conversation(self, index: int, output_share: float = 1.0) -> Conversation:
        """Yield the requests of conversation `index`: one, unless the workload has turns."""
        content, output_tokens = self._first(index)
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        answer = yield self._body(messages, max(1, math.ceil(output_tokens * output_share)))
        if self._workload.turns is None:
            return
        rng = seeded(self._seed, index, "turns")
        for turn in range(1, self._draw(rng, self._workload.turns.count)):
            words = max(1, round(self._draw(rng, self._workload.turns.added) / self._calibration.per_word))
            messages += _next_messages(turn, answer, text(rng, words), tools=self._workload.turns.tools)
            answer = yield self._body(messages, self._draw(rng, self._workload.output))

    def _first(self, index: int) -> tuple[str, int]:
        """Return the first message of conversation `index` and the length of its answer in tokens."""
        rng, workload = seeded(self._seed, index), self._workload
        prompt_tokens, output_tokens = self._draw(rng, workload.prompt), self._draw(rng, workload.output)
        words = self._calibration.words(prompt_tokens - workload.shared_prefix) - len(workload.instruction.split())
        return " ".join(filter(None, [self._prefix, text(rng, max(1, words)), workload.instruction])), output_tokens

    def _draw(self, rng: random.Random, lengths: Lengths) -> int:
        return lengths.at(rng.uniform(_SHORTEST, _LONGEST))

    def _body(self, messages: list[dict[str, Any]], max_tokens: int) -> bytes:
        extra = self._workload.extra | ({"timings_per_token": True} if self._calibration.timings else {})
        return streaming_body({"messages": messages, "max_tokens": max_tokens} | extra, self._model)


def _next_messages(turn: int, answer: str, added: str, *, tools: bool) -> list[dict[str, Any]]:
    """Return the messages that follow an answer. The tool call is ours, because small models make none."""
    if not tools:
        return [{"role": "assistant", "content": answer}, {"role": "user", "content": added}]
    function = {"name": "search", "arguments": '{"query": "the next step"}'}
    call = {"id": f"call_{turn}", "type": "function", "function": function}
    return [
        {"role": "assistant", "content": answer, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": added},
    ]


def chat_body(model: str, content: str, max_tokens: int, *, ignore_eos: bool) -> bytes:
    """Return a streaming chat request with one message."""
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": max_tokens}
    return streaming_body(body | {"ignore_eos": True} if ignore_eos else body, model)


def streaming_body(body: dict[str, Any], model: str) -> bytes:
    """Return `body` as a streaming request to `model` that asks for usage."""
    return msgspec.json.encode(body | {"model": model, "stream": True, "stream_options": {"include_usage": True}})


def text(rng: random.Random, words: int) -> str:
    """Return common English words in random order."""
    return " ".join(rng.choices(_vocabulary(), k=words))


def load_workload(name: str) -> Workload:
    """Load a bundled workload by name, or one from a YAML file by its path.

    Raises ValueError for an unknown name, or a file that does not describe a workload.
    """
    path = Path(name)
    if path.suffix in (".yml", ".yaml"):
        if not path.is_file():
            raise ValueError(f"no workload file {path}")
        source = path.read_bytes()
    elif name in workload_names():
        source = (_FILES / f"{name}.yml").read_bytes()
    else:
        raise ValueError(f"unknown workload {name!r}; available: {', '.join(workload_names())}, or a .yml file")
    try:
        return msgspec.yaml.decode(source, type=Workload)
    except msgspec.MsgspecError as error:
        raise ValueError(f"workload {name}: {error}") from error


def workload_names() -> list[str]:
    """Return the names of the bundled workloads."""
    return sorted(f.name.removesuffix(".yml") for f in _FILES.iterdir() if f.name.endswith(".yml"))


@cache
def _vocabulary() -> list[str]:
    return (_FILES / "words.txt").read_text(encoding="utf-8").split()
