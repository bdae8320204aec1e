"""Workloads: files that say how long prompts and answers are, and the fresh prompts made from them."""

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

from llamaherd_loadtest.dice import seeded

_FILES = resources.files("llamaherd_loadtest") / "workloads"
_SHORTEST, _LONGEST = 0.001, 0.999  # the quantiles that lengths are drawn between

Conversation = Generator[bytes, str, None]
"""The bodies of a conversation's requests, each after the first made when it is sent the answer to the one before."""

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
"""Tools of an agent's requests, in OpenAI's form."""


class Lengths(Struct, frozen=True, forbid_unknown_fields=True):
    """A distribution of lengths in tokens, cut to [min, max]; `sigma` 0 makes every one the median.

    `sigma` is of the logarithm where `distribution` is lognormal, in tokens where it is normal; uniform lengths lie
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
        """The p-quantile, tokens."""
        if self.distribution == "uniform":
            return round(self.min + p * (self.max - self.min))
        spread = self.sigma * NormalDist().inv_cdf(p)
        raw = self.median * math.exp(spread) if self.distribution == "lognormal" else self.median + spread
        return round(min(max(raw, self.min), self.max))

    @property
    def mean(self) -> float:
        """Tokens."""
        return fmean(self.at((n + 0.5) / 100) for n in range(100))


class Turns(Struct, frozen=True, forbid_unknown_fields=True):
    """How a conversation goes on: each of its `count` requests repeats all before it, the real answers included.

    `added` is what each brings anew. With `tools` requests carry definitions of tools, and what is added is a tool's
    result; without, it is a user's message.
    """

    count: Lengths
    added: Lengths
    tools: bool = False


class Workload(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What clients ask for. Prompt lengths are as the server counts them, chat template included.

    `shared_prefix` tokens at the head of each prompt are the same in one run (a system prompt); the rest is fresh.
    `instruction` ends each prompt: at its head it would be a prefix that every prompt shares.
    """

    name: str
    description: str
    prompt: Lengths
    output: Lengths
    shared_prefix: int = 0
    instruction: str = ""
    ignore_eos: bool = True  # answers as long as asked for, so that settings are compared on equal work
    turns: Turns | None = None

    @property
    def need(self) -> int:
        """Context that a request needs at the 99th percentile, tokens."""
        return self._context(0.99)

    @property
    def longest(self) -> int:
        """Context of the longest request that is ever sent, tokens."""
        return self._context(_LONGEST)

    def _context(self, p: float) -> int:
        turns = self.turns.count.at(p) if self.turns else 1
        added = self.turns.added.at(p) if self.turns else 0
        return self.prompt.at(p) + (turns - 1) * added + turns * self.output.at(p)

    @property
    def mean_tokens(self) -> dict[str, int]:
        """Of all requests' prompts and answers; a conversation's prompts grow with its turns."""
        more = (self.turns.count.mean - 1) / 2 * (self.turns.added.mean + self.output.mean) if self.turns else 0
        return {"prompt": round(self.prompt.mean + more), "output": round(self.output.mean)}

    @property
    def extra(self) -> dict[str, Any]:
        """Fields that its requests have besides messages and lengths."""
        tools = {"tools": TOOLS} if self.turns and self.turns.tools else {}
        return tools | ({"ignore_eos": True} if self.ignore_eos else {})

    def with_output(self, max_tokens: int) -> Workload:
        """The same with answers of `max_tokens`; 0 leaves them."""
        return msgspec.structs.replace(self, output=Lengths(max_tokens)) if max_tokens else self

    def with_prompt(self, tokens: int) -> Workload:
        """The same with prompts of `tokens`; 0 leaves them."""
        return msgspec.structs.replace(self, prompt=Lengths(tokens)) if tokens else self


class Calibration(Struct, frozen=True):
    """How the server counts our words, by its own tokenizer: tokens = overhead + per_word * words.

    `timings`: it must be asked to tell its timings. llama-server tells them unasked, other servers know no such field.
    """

    per_word: float
    overhead: float
    timings: bool = False

    def words(self, tokens: int) -> int:
        """Words that make a prompt of about `tokens` tokens."""
        return max(1, round((tokens - self.overhead) / self.per_word))


class Prompts:
    """The requests of one run: fresh for each seed and index, the same for the same two."""

    def __init__(self, workload: Workload, *, model: str, seed: int, calibration: Calibration) -> None:
        self._workload, self._model, self._seed, self._calibration = workload, model, seed, calibration
        self._prefix = ""
        if workload.shared_prefix:
            words = round(workload.shared_prefix / calibration.per_word)
            self._prefix = text(seeded(seed, "shared"), words)

    @property
    def needs_answers(self) -> bool:
        """Whether a conversation's next request repeats the answer to the one before."""
        return self._workload.turns is not None

    def request(self, index: int, output_share: float = 1.0) -> bytes:
        """The body of conversation `index`'s first request; `output_share` shortens its answer (a warm-up request)."""
        return next(self.conversation(index, output_share))

    def conversation(self, index: int, output_share: float = 1.0) -> Conversation:
        """The requests of conversation `index`: one, unless the workload has turns."""
        content, output_tokens = self._first(index)
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        answer = yield self._body(messages, max(1, math.ceil(output_tokens * output_share)))
        if self._workload.turns is None:
            return
        rng = seeded(self._seed, index, "turns")
        for turn in range(1, self._draw(rng, self._workload.turns.count)):
            words = max(1, round(self._draw(rng, self._workload.turns.added) / self._calibration.per_word))
            messages += _go_on(turn, answer, text(rng, words), tools=self._workload.turns.tools)
            answer = yield self._body(messages, self._draw(rng, self._workload.output))

    def _first(self, index: int) -> tuple[str, int]:
        """The first message of conversation `index`, and the length of its answer in tokens."""
        rng, workload = seeded(self._seed, index), self._workload
        prompt_tokens, output_tokens = self._draw(rng, workload.prompt), self._draw(rng, workload.output)
        words = self._calibration.words(prompt_tokens - workload.shared_prefix) - len(workload.instruction.split())
        return " ".join(filter(None, [self._prefix, text(rng, max(1, words)), workload.instruction])), output_tokens

    def _draw(self, rng: random.Random, lengths: Lengths) -> int:
        return lengths.at(rng.uniform(_SHORTEST, _LONGEST))

    def _body(self, messages: list[dict[str, Any]], max_tokens: int) -> bytes:
        extra = self._workload.extra | ({"timings_per_token": True} if self._calibration.timings else {})
        return streaming_body({"messages": messages, "max_tokens": max_tokens} | extra, self._model)


def _go_on(turn: int, answer: str, added: str, *, tools: bool) -> list[dict[str, Any]]:
    """The messages that follow an answer. The call that a tool's result answers is ours: small models make none."""
    if not tools:
        return [{"role": "assistant", "content": answer}, {"role": "user", "content": added}]
    function = {"name": "search", "arguments": '{"query": "the next step"}'}
    call = {"id": f"call_{turn}", "type": "function", "function": function}
    return [
        {"role": "assistant", "content": answer, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": added},
    ]


def chat_body(model: str, content: str, max_tokens: int, *, ignore_eos: bool) -> bytes:
    """A streaming chat request of one message."""
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": max_tokens}
    return streaming_body(body | {"ignore_eos": True} if ignore_eos else body, model)


def streaming_body(body: dict[str, Any], model: str) -> bytes:
    """`body` as a request of `model` that streams and asks for usage."""
    return msgspec.json.encode(body | {"model": model, "stream": True, "stream_options": {"include_usage": True}})


def text(rng: random.Random, words: int) -> str:
    """Common English words in random order."""
    return " ".join(rng.choices(_vocabulary(), k=words))


def load_workload(name: str) -> Workload:
    """Read a workload by name (those that come with the package) or by the path of a YAML file.

    Raises ValueError for an unknown name and for a file that does not describe a workload.
    """
    path = Path(name)
    if path.suffix in (".yml", ".yaml"):
        if not path.is_file():
            raise ValueError(f"no workload file {path}")
        source = path.read_bytes()
    elif name in workload_names():
        source = (_FILES / f"{name}.yml").read_bytes()
    else:
        raise ValueError(f"no workload {name!r}: give one of {', '.join(workload_names())}, or a .yml file")
    try:
        return msgspec.yaml.decode(source, type=Workload)
    except msgspec.MsgspecError as error:
        raise ValueError(f"workload {name}: {error}") from error


def workload_names() -> list[str]:
    """The workloads that come with the package."""
    return sorted(f.name.removesuffix(".yml") for f in _FILES.iterdir() if f.name.endswith(".yml"))


@cache
def _vocabulary() -> list[str]:
    return (_FILES / "words.txt").read_text(encoding="utf-8").split()
