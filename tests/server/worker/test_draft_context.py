"""A draft model over real contexts: its cells follow what sequences say, whatever becomes of them."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.wire.protocol import Finished, Generate, Sampling, Stats, WorkerConfig
from llamaherd_server.worker.context import Context
from llamaherd_server.worker.draft_context import DraftContext
from llamaherd_server.worker.intake import fit, sequence_of
from llamaherd_server.worker.interrupt import Interrupt
from llamaherd_server.worker.lib import Log, load
from llamaherd_server.worker.memory import context_bytes
from llamaherd_server.worker.model import Model
from llamaherd_server.worker.scheduler import Scheduler
from llamaherd_server.worker.sequence import Sequence
from llamaherd_server.worker.speculation import StepTimes
from llamaherd_server.worker.weights import ModelError
from tests.random_models import RandomModel

OFF = EngineSettings(parallel=4, ctx_per_slot=128, batch=128, ubatch=64, threads=1)
DRAFT = replace(OFF, speculative="draft", speculative_depth=6)
SMALL = RandomModel("dense", layers=1, width=128)
GREEDY = Sampling(temperature=0)


@pytest.fixture(autouse=True)
def drafts_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that they are as long as may be, on every machine."""
    for name in ("cost", "step_cost"):
        monkeypatch.setattr(StepTimes, name, lambda _self, _sequences: 1e-30)
    monkeypatch.setattr(StepTimes, "token_s", lambda _self, _sequences: 1.0)


def loaded(draft: Path | None, target: RandomModel = SMALL) -> Model:
    lib = load()
    lib.llama_backend_init()
    config = WorkerConfig(path=str(target.path()), draft=None if draft is None else str(draft), settings=OFF)
    return Model(lib, Log(lib), config, lambda _: None)


@pytest.fixture(scope="module")
def itself() -> Model:
    """The draft model is the model: what it drafts comes true."""
    return loaded(SMALL.path())


@pytest.fixture(scope="module")
def stranger() -> Model:
    """What it drafts hardly ever comes true."""
    return loaded(RandomModel("dense", layers=2, width=64).path())


@contextmanager
def scheduling(model: Model, settings: EngineSettings) -> Iterator[tuple[Scheduler, Context, Interrupt]]:
    interrupt = Interrupt(model.lib, model.log)
    context = Context(model, settings, interrupt)
    try:
        yield Scheduler(context), context, interrupt
    finally:
        context.close()


def sequences(model: Model, prompts: list[list[int]], new: int = 40, sampling: Sampling = GREEDY) -> list[Sequence]:
    made = []
    for number, prompt in enumerate(prompts):
        made.append(sequence_of(model, Generate(id=number, prompt=prompt, max_tokens=new, sampling=sampling)))
        fit(made[-1], 128)
    return made


def prompts(seed: int, count: int = 4, end: int = 9000) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1000, end) for _ in range(rng.randrange(1, 60))] for _ in range(count)]


def answers(model: Model, settings: EngineSettings, asked: list[list[int]], **more: Any) -> tuple[Any, Stats, int]:
    """All tokens of each, the drafts of all in one, and the steps."""
    with scheduling(model, settings) as (scheduler, _, _):
        all_of_them = sequences(model, asked, **more)
        for one in all_of_them:
            scheduler.add(one)
        while not scheduler.idle:
            step = scheduler.step()
        return [one.tokens for one in all_of_them], step.stats, step.stats.step


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "split"])
def test_a_model_that_drafts_for_itself_is_right_and_takes_fewer_steps(itself: Model, unified: bool) -> None:
    asked = prompts(1)
    off, _, many = answers(itself, replace(OFF, kv_unified=unified), asked)
    on, stats, few = answers(itself, replace(DRAFT, kv_unified=unified), asked)
    assert on == off
    assert stats.accepted_tokens >= 0.95 * stats.drafted_tokens > 0  # several are summed in another order than one
    assert few < many / 3


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1, seed=3)], ids=["greedy", "sampled"])
def test_a_model_that_drafts_wrongly_changes_nothing(stranger: Model, sampling: Sampling) -> None:
    off, _, _ = answers(stranger, replace(OFF, kv_unified=False), prompts(2), sampling=sampling)
    on, stats, _ = answers(stranger, replace(DRAFT, kv_unified=False), prompts(2), sampling=sampling)
    assert on == off
    assert stats.accepted_tokens < 0.2 * stats.drafted_tokens


@pytest.mark.parametrize(("parallel", "cells"), [(4, 0), (8, 128)], ids=["enough cells", "few cells"])
def test_its_cells_follow_sequences_that_come_and_go(itself: Model, parallel: int, cells: int) -> None:
    """Shared beginnings, cancels, too few cells, steps that are stopped: drafts stay right, and so do answers."""
    rng = random.Random(3)
    systems = prompts(4, count=2)
    asked = [[*rng.choice(systems)[: rng.randrange(4, 50)], *prompts(n, count=1)[0][:20]] for n in range(24)]
    off = {}
    for number, prompt in enumerate(asked):
        [off[number]], _, _ = answers(itself, OFF, [prompt], new=30)
    with scheduling(itself, replace(DRAFT, parallel=parallel, kv_cells=cells)) as (scheduler, context, interrupt):
        todo = sequences(itself, asked, new=30)
        ended: dict[int, list[int]] = {}
        cancelled: set[int] = set()
        while todo or not scheduler.idle:
            if todo and rng.random() < 0.6:
                scheduler.add(todo.pop())
            running = scheduler.running
            if running and rng.random() < 0.03:
                cancelled.add(running[0].id)
                scheduler.cancel(running[0].id)
            if rng.random() < 0.2:
                threading.Timer(rng.random() / 50, interrupt.set).start()
            there = {one.id: one.tokens for one in [*scheduler.running, *scheduler.waiting]}
            step = scheduler.step()
            interrupt.clear()
            ended |= {event.id: there[event.id] for event in step.events if isinstance(event, Finished)}
            assert isinstance(context.drafts, DraftContext)
            for followed in context.drafts._slots:
                memory = context.drafts._memory
                assert itself.lib.llama_memory_seq_pos_max(memory, followed.slot) + 1 == followed.computed
    assert sorted([*ended, *cancelled]) == [*range(len(asked))]
    assert sum(off[number] == tokens for number, tokens in ended.items()) >= len(ended) - 1  # sums in another order
    assert step.stats.accepted_tokens >= 0.9 * step.stats.drafted_tokens > 0


@pytest.mark.parametrize("more", [-7, 7])
def test_a_vocabulary_may_be_a_little_longer_than_the_other(more: int) -> None:
    """Tokens that the draft model lacks come in prompts, and it drafts none that the model lacks."""
    target = RandomModel("dense", layers=1, width=128, vocab=50_000)
    model = loaded(RandomModel("dense", layers=1, width=128, vocab=50_000 + more).path(), target)
    asked = [[*prompt, 49_999] for prompt in prompts(5, end=50_000)]
    off, _, _ = answers(model, OFF, asked)
    on, stats, _ = answers(model, DRAFT, asked)
    assert on == off
    assert stats.drafted_tokens > 0


def test_a_sliding_window_is_cut_back_as_well() -> None:
    model = loaded(RandomModel("sliding_window", layers=6, width=64).path())
    off, _, _ = answers(model, OFF, prompts(6))
    on, stats, _ = answers(model, DRAFT, prompts(6))
    assert on == off
    assert stats.drafted_tokens > 0


def test_what_cannot_draft_is_refused_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is recurrent and cannot drop rejected tokens"):
        loaded(RandomModel("hybrid", layers=3, width=64).path())
    other = tmp_path / "other.gguf"
    would, could = (len(text).to_bytes(8, "little") + text for text in map(str.encode, ("Ġwould", "Ġcould")))
    content, between = SMALL.path().read_bytes(), b"in between, neither of the two"
    other.write_bytes(content.replace(would, between).replace(could, would).replace(between, could))
    with pytest.raises(ModelError, match=r"a different vocabulary \(token \d+ is b'\S+could', not b'\S+would"):
        loaded(other)


def test_its_context_counts_while_it_drafts(itself: Model) -> None:
    assert context_bytes(itself, DRAFT) == 2 * context_bytes(itself, replace(DRAFT, speculative="ngram"))
