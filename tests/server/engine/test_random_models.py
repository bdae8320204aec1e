"""The models of random weights answer as tests and benchmarks of prompt state need it."""

from __future__ import annotations

import pytest

from bench.serving import WORDS
from llamaherd_server.wire.engine_settings import EngineSettings
from tests.random_models import ARCHITECTURES, CONTEXT, Kind, RandomModel

from .asking import ask
from .conftest import running

PROMPT = WORDS * 4


@pytest.mark.parametrize("kind", ARCHITECTURES)
async def test_an_answer_hangs_on_all_of_its_prompt_and_is_the_same_tokens_again(kind: Kind) -> None:
    settings = EngineSettings(parallel=1, ctx_per_slot=CONTEXT, threads=1)
    async with running(settings, path=RandomModel(kind, layers=6).path()) as engine:
        answer = await ask(engine, " ".join(PROMPT), 32)
        assert answer.finished.reason == "length"
        assert len(answer.text.split()) == answer.finished.completion_tokens == 32
        assert len(await engine.tokenize(answer.text)) == 32
        for place in (0, 100):
            other = await ask(engine, " ".join([*PROMPT[:place], "stop", *PROMPT[place + 1 :]]), 32)
            assert other.text != answer.text


async def test_a_model_has_as_large_a_vocabulary_as_asked_for() -> None:
    async with running(path=RandomModel("dense", layers=1, vocab=60_000).path()) as engine:
        assert len((await ask(engine, "A", 8)).text.split()) == 8
