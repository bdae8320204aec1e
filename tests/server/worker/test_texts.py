"""What of a prompt is remembered as tokens: the same tokens as without, and only what its own scope has sent."""

from __future__ import annotations

import random
from typing import Any

import pytest

from llamaherd_server.wire.errors import RequestError
from llamaherd_server.wire.protocol import Generate, Sampling
from llamaherd_server.worker import intake, texts
from llamaherd_server.worker.arena import Arena, create
from llamaherd_server.worker.forkserver import SHORT_CHARS, Job
from llamaherd_server.worker.intake import sequence_of
from llamaherd_server.worker.model import Model
from llamaherd_server.worker.prompts import PromptCache
from llamaherd_server.worker.sequence import Sequence
from llamaherd_server.worker.texts import Texts

_rng = random.Random(5)
SYLLABLES = [
    "ka",
    "Lo ",
    "é",
    " 日本",
    "\n\n",
    "  ",
    "<|",
    "|>",
    "im_",
    "<|im_start|>",
    "<|im_end|>",
    "42",
    "'s",
    "\t",
    "🦙",
]


def message(role: str, length: int) -> str:
    content = "".join(_rng.choices(SYLLABLES, k=length // 3))
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def read(model: Model, memory: Texts | None, prompt: str, scope: str = "", room: int = 2**20) -> Sequence:
    request = Generate(id=1, prompt=prompt, sampling=Sampling(), add_special=True, cache_scope=scope)
    sequence = sequence_of(model, request, None, room, memory)
    sequence.sampler.close()
    return sequence


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The texts of each job."""
    seen: list[list[str]] = []

    def job(read: list[str], *args: Any, **kwargs: Any) -> Job:
        seen.append(read)
        return Job(read, *args, **kwargs)

    monkeypatch.setattr(intake, "Job", job)
    return seen


def test_a_chat_has_the_tokens_that_it_has_without_a_memory(model: Model) -> None:
    memory = Texts()
    for _ in range(8):
        chat = "".join(message(_rng.choice(["system", "user"]), _rng.choice([30, 900, 9000])) for _ in range(4))
        for _ in range(3):
            chat += message("user", 300) + message("assistant", 600)
            assert read(model, memory, chat).tokens == model.tokenize(chat, add_special=True, parse_special=True)


def test_a_next_turn_tokenises_what_is_new(model: Model, jobs: list[list[str]]) -> None:
    memory = Texts()
    long, new = message("user", 40_000), message("user", 900)
    read(model, memory, long + new)
    turn = message("user", 1200)
    read(model, memory, long + new + turn)
    assert sum(map(len, jobs[0])) == len(long + new)
    assert sum(map(len, jobs[1])) <= len(new + turn)
    read(model, memory, long + new, scope="another key")
    assert sum(map(len, jobs[2])) == len(long + new)


def test_it_is_kept_with_the_computed_prompt(model: Model, jobs: list[list[str]]) -> None:
    chat = message("user", 20_000) + message("user", 500)
    fd = create(2**20)
    before = PromptCache(Arena(fd, 2**20), "model")
    sequence = read(model, before.texts, chat, "key")

    def save(buffer: Any) -> int:
        buffer(1)
        return 1

    assert before.put("key", sequence.tokens[:30], (None, 0), [], save)
    after_first = before.lacks("key", sequence.tokens, chained=True)
    assert after_first is not None
    assert after_first[1] == 30  # in the middle of the text
    assert before.put("key", sequence.tokens, after_first, [], save, texts=sequence.texts)
    after = PromptCache(Arena(fd, 2**20), "model")
    assert read(model, after.texts, chat + message("user", 300), "key").tokens[: sequence.n_prompt] == sequence.tokens
    assert sum(map(len, jobs[1])) < 2 * 600


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MAX_TOKENS", 100)
    memory = Texts()
    for number in range(10):
        memory.put(bytes([number]), [*range(30)])
        assert memory.get(b"\0") is not None  # which is used all the time
    assert [number for number in range(10) if memory.get(bytes([number]))] == [0, 8, 9]


def test_a_prompt_without_room_is_refused_with_all_its_tokens(model: Model) -> None:
    memory = Texts()
    long = message("user", 20_000)
    chat = long + message("user", 20_000)
    count = len(model.tokenize(chat, add_special=True, parse_special=True))
    read(model, memory, long + message("user", 400))
    with pytest.raises(RequestError, match=rf"has {count} tokens"):
        read(model, memory, chat, room=count)


@pytest.mark.parametrize("prompt", ["a" * (SHORT_CHARS + 1), message("user", 9000) * 40, "<|im_start|>" * 1000])
def test_what_is_long_or_without_parts_has_its_tokens_too(model: Model, prompt: str) -> None:
    sequence = read(model, Texts(), prompt)
    assert sequence.tokens == model.tokenize(prompt, add_special=True, parse_special=True)
