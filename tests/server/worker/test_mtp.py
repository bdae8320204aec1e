"""Drafts by the model's own head, of models whose head guesses what is known."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.wire.protocol import Finished, Generate, Sampling, Stats, WorkerConfig
from llamaherd_server.worker.context import Context
from llamaherd_server.worker.intake import fit, sequence_of
from llamaherd_server.worker.interrupt import Interrupt
from llamaherd_server.worker.lib import Log, load
from llamaherd_server.worker.memory import DoesNotFit
from llamaherd_server.worker.model import Model
from llamaherd_server.worker.scheduler import Scheduler
from llamaherd_server.worker.sequence import Sequence
from llamaherd_server.worker.speculation import StepTimes
from llamaherd_server.worker.weights import ModelError
from tests.mtp_model import Looks, mtp_model
from tests.random_models import RandomModel

SETTINGS = EngineSettings(
    parallel=3, ctx_per_slot=128, batch=64, ubatch=32, threads=1, speculative="mtp", speculative_depth=4
)
OFF = replace(SETTINGS, speculative="off")
NEW, GREEDY = 41, Sampling(temperature=0)


@pytest.fixture(autouse=True)
def drafts_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cost", "step_cost"):
        monkeypatch.setattr(StepTimes, name, lambda _self, _sequences: 1e-30)
    monkeypatch.setattr(StepTimes, "token_s", lambda _self, _sequences: 1.0)


def loaded(path: str, settings: EngineSettings = SETTINGS) -> Model:
    lib = load()
    lib.llama_backend_init()
    return Model(lib, Log(lib), WorkerConfig(path=path, settings=settings), lambda _: None)


@pytest.fixture(scope="module")
def models() -> dict[Looks, Model]:
    return {looks: loaded(str(mtp_model(looks))) for looks in ("token", "state")}


def contexts(model: Model, *settings: EngineSettings) -> Iterator[tuple[Context, Scheduler]]:
    for each in settings:
        context = Context(model, each, Interrupt(model.lib, model.log))
        yield context, Scheduler(context)
        context.close()


def sequences(model: Model, count: int, new: int = NEW) -> list[Sequence]:
    made = []
    for number in range(count):
        prompt = [1000 + 7 * number + step for step in range(20 + 15 * number)]
        request = Generate(id=number, prompt=prompt, max_tokens=new, sampling=GREEDY)
        made.append(sequence_of(model, request))
        fit(made[-1], 128)
    return made


def finish(scheduler: Scheduler, added: list[Sequence]) -> Stats:
    for sequence in added:
        scheduler.add(sequence)
    while not scheduler.idle:
        step = scheduler.step()
        assert all(isinstance(event, Finished) or not hasattr(event, "code") for event in step.events)
    return step.stats


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "split"])
def test_a_head_that_looks_at_the_token_guesses_all(models: dict[Looks, Model], unified: bool) -> None:
    answers = []
    for _, scheduler in contexts(models["token"], *(replace(one, kv_unified=unified) for one in (OFF, SETTINGS))):
        made = sequences(models["token"], 3)
        stats = finish(scheduler, made)
        answers.append([one.tokens for one in made])
    assert answers[0] == answers[1]
    assert stats.accepted_tokens == stats.drafted_tokens > 0.7 * 3 * NEW


def test_a_head_that_looks_at_the_state_guesses_the_next_token_only(models: dict[Looks, Model]) -> None:
    answers = []
    for _, scheduler in contexts(models["state"], OFF, replace(SETTINGS, speculative_depth=2)):
        made = sequences(models["state"], 3)
        stats = finish(scheduler, made)
        answers.append([one.tokens for one in made])
    assert answers[0] == answers[1]
    assert 2 * stats.accepted_tokens == pytest.approx(stats.drafted_tokens, abs=6)
    assert stats.accepted_tokens > 0.4 * 3 * NEW


def test_the_head_keeps_what_the_slots_keep(models: dict[Looks, Model]) -> None:
    """Turns of a chat in its slot, and another request that shares its prefix: the first guess may miss, no other."""
    model = models["state"]
    for _, scheduler in contexts(model, replace(SETTINGS, speculative_depth=1)):
        (chat,) = sequences(model, 1, new=20)
        finish(scheduler, [chat])
        for extra in (1234, 2345):
            turns = [
                sequence_of(model, Generate(id=id, prompt=[*chat.tokens, extra], max_tokens=20, sampling=GREEDY))
                for id in (1, 2)
            ]
            for one in turns:
                fit(one, 128)
            stats = finish(scheduler, turns)
            chat = turns[0]
            assert turns[0].tokens == turns[1].tokens
    assert stats.cached_tokens > 4 * 40
    assert stats.accepted_tokens >= stats.drafted_tokens - 5


def test_answers_do_not_change_where_cells_run_short(models: dict[Looks, Model]) -> None:
    """Sequences are preempted and resumed, and the head's cells are given to others."""
    answers = []
    for _, scheduler in contexts(models["token"], *(replace(one, kv_cells=256) for one in (OFF, SETTINGS))):
        made = [one for _ in range(3) for one in sequences(models["token"], 3, new=70)]
        stats = finish(scheduler, made)
        answers.append([one.tokens for one in made])
        assert stats.preemptions > 0
    assert answers[0] == answers[1]


def test_a_reconfiguration_goes_on(models: dict[Looks, Model]) -> None:
    model = models["token"]
    expected, made = sequences(model, 3), sequences(model, 3)
    (_, scheduler), (_, drafting), (_, other) = opened = [
        next(contexts(model, one)) for one in (OFF, SETTINGS, replace(SETTINGS, parallel=2))
    ]
    finish(scheduler, expected)
    for one in made:
        drafting.add(one)
    for _ in range(3):
        drafting.step()
    drafting.preempt_all(keep=True)
    drafting.attach(opened[2][0])
    finish(drafting, [])
    assert [one.tokens for one in made] == [one.tokens for one in expected]
    assert other.idle


def test_a_model_without_heads_is_refused() -> None:
    with pytest.raises(ModelError, match="has 0 MTP heads, not one"):
        loaded(str(RandomModel("dense", layers=1, width=128).path()))


def test_heads_that_were_not_loaded_are_refused() -> None:
    model = loaded(str(mtp_model("token")), OFF)
    with pytest.raises(DoesNotFit, match="only a start with mtp loads"):
        Context(model, SETTINGS, Interrupt(model.lib, model.log))
