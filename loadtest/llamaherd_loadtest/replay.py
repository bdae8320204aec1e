"""Workloads of recorded requests: a JSON-lines log of OpenAI request bodies, or ShareGPT conversations."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from llamaherd_loadtest.rng import seeded
from llamaherd_loadtest.workload import Calibration, Conversation, streaming_body

_CONVERSATIONS = 1000  # of a ShareGPT file, which has some 90,000
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant"}

CountTokens = Callable[[str], int | None]


class Turn(Struct, frozen=True):
    """One request of a conversation: the messages it adds to the previous ones, and its other fields."""

    messages: list[dict[str, Any]]
    fields: dict[str, Any]


class Replay:
    """The conversations of a file in a seeded order; starts over at the end."""

    def __init__(self, conversations: Sequence[list[Turn]], count: CountTokens) -> None:
        self._conversations, self._count = conversations, count
        self._needs_answers = any(len(turns) > 1 for turns in conversations)
        self._model, self._timings = "", False

    @property
    def needs_answers(self) -> bool:
        """Whether later requests of a conversation contain the answers to earlier ones."""
        return self._needs_answers

    @property
    def longest(self) -> int:
        """Context of the longest conversation in the server's tokens, without its template; 0 if unknown."""
        longest = max(self._conversations, key=lambda turns: sum(len(str(turn.messages)) for turn in turns))
        texts = [str(message.get("content") or "") for turn in longest for message in turn.messages]
        answers = sum(int(turn.fields.get("max_tokens") or 0) for turn in longest)
        tokens = self._count("\n".join(texts))
        return 0 if tokens is None else tokens + answers

    def use(self, model: str, calibration: Calibration) -> Replay:
        """Send requests to `model`, and request timings if the server needs that."""
        self._model, self._timings = model, calibration.timings
        return self

    def conversation(self, index: int, output_share: float = 1.0) -> Conversation:
        """Yield the requests of conversation `index`; `output_share` shortens the answers (a warm-up request)."""
        messages: list[dict[str, Any]] = []
        for turn in self._conversations[index % len(self._conversations)]:
            messages = messages + turn.messages
            fields = turn.fields | ({"timings_per_token": True} if self._timings else {})
            if output_share < 1 and fields.get("max_tokens"):
                fields["max_tokens"] = max(1, int(fields["max_tokens"] * output_share))
            answer = yield streaming_body(fields | {"messages": messages}, self._model)
            messages.append({"role": "assistant", "content": answer})


def read_replay(path: Path, seed: int, max_tokens: int, count: CountTokens) -> Replay:
    """Read `.jsonl` (request bodies, also wrapped as in OpenAI's batch files) or `.json` (ShareGPT).

    `max_tokens` above 0 replaces the lengths of answers. ShareGPT's answers are otherwise as long as the recorded ones
    by `count`, the server's tokenizer. Raises ValueError if the file is malformed, OSError if it is unreadable.
    """
    rng = seeded(seed, "replay")
    if path.suffix == ".json":
        conversations = list(_sharegpt(path, rng, max_tokens, count))
    else:
        conversations = list(_bodies(path, max_tokens))
    if not conversations:
        raise ValueError(f"workload {path} has no requests")
    rng.shuffle(conversations)
    return Replay(conversations, count)


def _bodies(path: Path, max_tokens: int) -> Iterator[list[Turn]]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            body = msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.MsgspecError as error:
            raise ValueError(f"workload {path}, line {number}: {error}") from error
        body = body.get("body", body)
        if not isinstance(body, dict) or not isinstance(body.get("messages"), list) or not body["messages"]:
            raise ValueError(f"workload {path}, line {number}: no `messages`: each line is a chat request's body")
        fields = body | ({"max_tokens": max_tokens} if max_tokens else {})
        messages = fields.pop("messages")
        yield [Turn(messages, fields)]


class _Message(Struct):
    speaker: str = msgspec.field(name="from")
    value: str


class _Recorded(Struct):
    conversations: list[_Message]


def _sharegpt(path: Path, rng: random.Random, max_tokens: int, count: CountTokens) -> Iterator[list[Turn]]:
    try:
        recorded = msgspec.json.decode(path.read_bytes(), type=list[_Recorded])
    except msgspec.MsgspecError as error:
        raise ValueError(f"workload {path}: {error}: expected ShareGPT's list of `conversations`") from error
    recorded = rng.sample(recorded, min(len(recorded), _CONVERSATIONS))
    for one in recorded:
        turns = [
            Turn([{"role": "user", "content": question.value}], {"max_tokens": length, "ignore_eos": True})
            for question, answer in _exchanges(one.conversations)
            if (length := max_tokens or count(answer.value) or 0) > 0
        ]
        if turns:
            yield turns


def _exchanges(messages: Sequence[_Message]) -> Generator[tuple[_Message, _Message]]:
    for question, answer in pairwise(messages):
        if _ROLES.get(question.speaker) == "user" and _ROLES.get(answer.speaker) == "assistant":
            yield question, answer
