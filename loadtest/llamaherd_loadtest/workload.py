"""Workloads: files that say how long prompts and answers are, and the fresh prompts made from them."""

from __future__ import annotations

import math
import random
from functools import cache
from importlib import resources
from pathlib import Path
from statistics import NormalDist

import msgspec
from msgspec import Struct

from llamaherd_loadtest.dice import seeded

_FILES = resources.files("llamaherd_loadtest") / "workloads"


class Lengths(Struct, frozen=True, forbid_unknown_fields=True):
    """A log-normal distribution of lengths in tokens, cut to [min, max]; `sigma` 0 makes every one the median."""

    median: int
    sigma: float = 0.0
    min: int = 1
    max: int = 1 << 20

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.median <= self.max or self.sigma < 0:
            raise ValueError(f"lengths need 1 <= min <= median <= max and sigma >= 0, not {self}")

    def at(self, p: float) -> int:
        """The p-quantile, tokens."""
        raw = self.median * math.exp(self.sigma * NormalDist().inv_cdf(p)) if self.sigma else self.median
        return round(min(max(raw, self.min), self.max))


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

    @property
    def need(self) -> int:
        """Context that a request needs at the 99th percentile, tokens."""
        return self.prompt.at(0.99) + self.output.at(0.99)

    def with_output(self, max_tokens: int) -> Workload:
        """The same with answers of `max_tokens`; 0 leaves them."""
        return msgspec.structs.replace(self, output=Lengths(max_tokens)) if max_tokens else self


class Calibration(Struct, frozen=True):
    """How the server's tokenizer counts our words, by its own usage figures: tokens = overhead + per_word * words."""

    per_word: float
    overhead: float

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

    def request(self, index: int, output_share: float = 1.0) -> bytes:
        """The body of request `index`; `output_share` shortens its answer (a warm-up request)."""
        rng = seeded(self._seed, index)
        prompt_tokens = self._workload.prompt.at(rng.uniform(0.001, 0.999))
        output_tokens = self._workload.output.at(rng.uniform(0.001, 0.999))
        words = self._calibration.words(max(1, prompt_tokens - self._workload.shared_prefix))
        content = " ".join(filter(None, [self._prefix, text(rng, words), self._workload.instruction]))
        return chat_body(
            self._model, content, max(1, math.ceil(output_tokens * output_share)), ignore_eos=self._workload.ignore_eos
        )


def chat_body(model: str, content: str, max_tokens: int, *, ignore_eos: bool) -> bytes:
    """A streaming chat request that asks for usage."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return msgspec.json.encode(body | {"ignore_eos": True} if ignore_eos else body)


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
