"""What is kept of prompts changes no answer: random chats, forks and edits of history, with little room for all."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from msgspec.structs import replace

from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.wire.protocol import Finished, Generate, Sampling, Started, Step, WorkerConfig
from llamaherd_server.worker import arena
from llamaherd_server.worker.context import Context
from llamaherd_server.worker.intake import fit, sequence_of
from llamaherd_server.worker.interrupt import Interrupt
from llamaherd_server.worker.lib import Log, load
from llamaherd_server.worker.model import Model
from llamaherd_server.worker.prompt_files import store
from llamaherd_server.worker.prompts import PromptCache
from llamaherd_server.worker.scheduler import Scheduler
from llamaherd_server.worker.sequence import Sequence
from llamaherd_server.worker.speculation import Wanted
from tests.random_models import Kind, RandomModel

CHATS, SLOTS, ROOM, NEW = 6, 2, 1536, 6
OPENER = 1  # <|im_start|>


@pytest.fixture(scope="module", params=["dense", "hybrid", "sliding_window"])
def random_model(request: pytest.FixtureRequest) -> Model:
    kind: Kind = request.param
    lib = load()
    lib.llama_backend_init()
    path = RandomModel(kind, layers=6, width=128).path()
    return Model(lib, Log(lib), WorkerConfig(path=str(path), settings=EngineSettings()), lambda _: None)


class Guesses:
    """Drafts that are right up to a random place, by a context of their own that keeps nothing."""

    catch_up_s = drafting_s = 0.0

    def __init__(self, model: Model, settings: EngineSettings) -> None:
        self._model, self._random = model, random.Random(2)
        own = Interrupt(model.lib, model.log)  # not stopped with the steps
        self._context = Context(model, replace(settings, parallel=1, speculative="off"), own)

    def propose(self, wanted: list[Wanted], room: int, worth: float, budget_s: float) -> None:
        for sequence, most in wanted:
            right = self._random.randrange(most + 1)
            sequence.draft = self._greedy(sequence.tokens, right) + [OPENER] * (most - right)

    def _greedy(self, tokens: list[int], count: int) -> list[int]:
        answer: list[int] = []
        for logits in cold_logits(self._context, self._model, tokens, answer, count):
            answer.append(int(np.argmax(logits)))  # noqa: PERF401 (cold_logits reads it meanwhile)
        return answer

    def close(self) -> None:
        self._context.close()


@dataclass
class Herd:
    """A scheduler that can lose its worker's part, or all but the files."""

    model: Model
    settings: EngineSettings
    folder: Path
    cached = drafted = accepted = 0

    def __post_init__(self) -> None:
        self.size = 64 << 20
        self.fd = arena.create(self.size)
        self.interrupt = Interrupt(self.model.lib, self.model.log)
        self.open()
        self.start()

    def open(self) -> None:
        self.context = Context(self.model, self.settings, self.interrupt)
        if self.context.draft_depth:
            self.context.drafts = Guesses(self.model, self.settings)  # type: ignore[assignment]

    def start(self) -> None:
        """As a worker does, over what is there."""
        self.prompts = PromptCache(arena.Arena(self.fd, self.size), "model", self.folder)
        self.scheduler = Scheduler(self.context, prompts=self.prompts)

    def lose_worker(self) -> None:
        self.context.close()
        self.open()
        self.start()

    def restart(self) -> None:
        store(arena.Arena(self.fd, self.size), self.folder, self.size, 60)
        os.close(self.fd)
        self.fd = arena.create(self.size)
        self.lose_worker()

    def reconfigure(self, settings: EngineSettings) -> None:
        self.scheduler.preempt_all(keep=True)
        self.context.close()
        self.settings = settings
        self.open()
        self.scheduler.attach(self.context)

    def step(self) -> Step:
        step = self.scheduler.step()
        self.drafted = max(self.drafted, step.stats.drafted_tokens)
        self.accepted = max(self.accepted, step.stats.accepted_tokens)
        return step

    def add(self, prompt: list[int]) -> Sequence:
        request = Generate(id=len(prompt), prompt=prompt, max_tokens=NEW, sampling=Sampling(temperature=0))
        sequence = sequence_of(self.model, request)
        fit(sequence, ROOM)
        self.prompts.fetch("", prompt)
        self.scheduler.add(sequence)
        return sequence

    def finish(self) -> None:
        while not self.scheduler.settled:
            for event in self.step().events:
                if isinstance(event, Started):
                    self.cached += event.cached_tokens
                assert isinstance(event, Finished) or not hasattr(event, "code")
            self.interrupt.clear()


def messages(generator: random.Random, count: int, longest: int) -> list[int]:
    return [
        token
        for _ in range(count)
        for token in [OPENER, *(generator.randrange(1000, 9000) for _ in range(generator.randrange(5, longest)))]
    ]


# Which tokens of a prompt are computed together changes how llama.cpp rounds: little, and more with flash attention,
# whose kernels for many tokens and for few differ. What is not theirs is out by whole logits.
@pytest.mark.parametrize(
    ("more", "tolerance"),
    [
        pytest.param({"flash_attention": "off"}, 0.02, id="f16"),
        pytest.param({"flash_attention": "off", "speculative": "draft", "speculative_depth": 4}, 0.02, id="drafts"),
        pytest.param({"flash_attention": "on", "kv_type_k": "q8_0", "kv_type_v": "q8_0"}, 0.5, id="q8_0"),
    ],
)
@pytest.mark.parametrize("unified", [True, False], ids=["unified", "split"])
def test_answers_are_the_same_warm_and_cold(
    random_model: Model, tmp_path: Path, unified: bool, more: dict[str, Any], tolerance: float
) -> None:
    settings = EngineSettings(
        parallel=SLOTS, ctx_per_slot=ROOM, kv_unified=unified, batch=512, ubatch=128, threads=1, **more
    )
    herd, generator, answers = Herd(random_model, settings, tmp_path), random.Random(1), []
    stops: list[threading.Timer] = []
    chats = [messages(generator, 2, 250) for _ in range(CHATS)]
    chats += [[*chats[0][:150], *messages(generator, 1, 200)] for _ in range(2)]
    for turn in range(4):
        for number in generator.sample(range(len(chats)), len(chats)):
            chat = chats[number]
            if generator.random() < 0.2:  # an earlier message was edited
                del chat[generator.randrange(len(chat) // 2, len(chat)) :]
            chat += messages(generator, 1, 60)
            running = [(herd.add([*chat]), number)]
            if generator.random() < 0.4:  # beside another one, that goes away or stops the step
                other = herd.add([*chats[number - 1], *messages(generator, 1, 40)])
                if generator.random() < 0.5:
                    herd.step()
                    herd.scheduler.cancel(other.id)
                stops.append(threading.Timer(generator.random() / 50, herd.interrupt.set))
                stops[-1].start()
            if generator.random() < 0.2:
                herd.step()
                herd.reconfigure(settings)
            herd.finish()
            for sequence, which in running:
                answers.append((sequence.tokens[: sequence.n_prompt], sequence.tokens[sequence.n_prompt :]))
                chats[which] = [*sequence.tokens]
        (herd.lose_worker if turn % 2 else herd.restart)()
    for stop in stops:
        stop.join()
    herd.interrupt.clear()  # one may have come after the last step
    assert herd.cached > sum(len(prompt) for prompt, _ in answers) / 2
    if herd.context.draft_depth:
        assert 0 < herd.accepted < herd.drafted
    herd.context.close()
    os.close(herd.fd)
    cold = Context(random_model, settings, herd.interrupt)
    for prompt, answer in answers:
        for token, logits in zip(answer, cold_logits(cold, random_model, prompt, answer, len(answer)), strict=True):
            assert max(logits) - logits[token] <= tolerance
    cold.close()


@dataclass
class Alone:
    """As a sequence, of one context without a scheduler."""

    tokens: list[int]
    slot = computed = id = 0
    preemptible = False
    draft: ClassVar[list[int]] = []

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def request(self) -> Alone:
        return self


def cold_logits(
    context: Context, model: Model, prompt: list[int], answer: list[int], count: int
) -> Iterator[list[float]]:
    """Those from which each of the first `count` tokens of `answer` is taken, where nothing is warm."""
    context.forget(0)
    alone = Alone([*prompt])
    for number in range(count):
        while alone.pending:
            share = min(alone.pending, context.settings.batch)
            assert context.decode([(alone, share)]) == 0  # type: ignore[list-item]
            alone.computed += share
        yield model.lib.llama_get_logits_ith(context._handle, -1)[: model.n_vocab]
        alone.tokens.append(answer[number])
