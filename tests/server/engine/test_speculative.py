"""With drafts the answers are those without: of a real model that repeats itself, for every field of a request."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from msgspec.structs import replace

from llamaherd_server.engine.embedded import EmbeddedEngine
from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.wire.protocol import Generate, ReasoningBudget, Sampling, Started, Stats, TokenLogprob
from tests.random_models import RandomModel

from .asking import Answer, ask
from .conftest import SETTINGS, running

pytestmark = pytest.mark.asyncio(loop_scope="module")
OFF = EngineSettings(parallel=4, ctx_per_slot=1024, batch=512, ubatch=256, threads=1)
NGRAM = replace(OFF, speculative="ngram", speculative_depth=6)
# The model says these alone, so that what it says came before.
WORDS = " the of and"
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("greedy", {"sampling": {"temperature": 0}}),
    ("sampled", {"sampling": {"temperature": 1.2}}),
    ("logprobs", {"sampling": {}, "logprobs": 3}),
    ("penalties", {"sampling": {"repeat_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.5}}),
    ("dry", {"sampling": {"temperature": 0, "dry_multiplier": 2.0}}),
    ("mirostat", {"sampling": {"mirostat": 2}}),
    ("xtc", {"sampling": {"xtc_probability": 0.5, "xtc_threshold": 0.05}}),
    ("stop", {"sampling": {"temperature": 0.7}, "stop": ["the the", "of of", "and and"]}),
    ("grammar", {"sampling": {"grammar": 'root ::= (" the" | " of")+ " and"'}}),
    ("reasoning", {"sampling": {}, "reasoning": ReasoningBudget(begin="<x>", end=" of the", tokens=5, begun=True)}),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def small() -> AsyncIterator[EmbeddedEngine]:
    async with running(OFF, path=RandomModel("dense", layers=1, width=128).path()) as engine:
        yield engine


async def bias(engine: EmbeddedEngine) -> dict[int, float]:
    return dict.fromkeys(await engine.tokenize(WORDS), 100.0)


def assert_alike(one: list[TokenLogprob], other: list[TokenLogprob]) -> None:
    """The same tokens; several computed together are summed in another order than one alone."""
    assert [each.token for each in one] == [each.token for each in other]
    assert [each.logprob for each in one] == pytest.approx([each.logprob for each in other], abs=1e-3)


def drafted(engine: EmbeddedEngine) -> int:
    stats = engine.status().stats
    assert stats is not None
    return stats.drafted_tokens


async def answers(
    engine: EmbeddedEngine, settings: EngineSettings, seed: int, tokens: int = 40, biased: bool = True, **more: Any
) -> list[Answer]:
    """To four prompts at once that repeat parts of themselves, as the answers do where they are `biased`."""
    await engine.retune(settings)
    rng = random.Random(seed)
    sampling = Sampling(**more.pop("sampling"), seed=seed, logit_bias=await bias(engine) if biased else {})
    phrases = [" ".join(rng.choices(WORDS.split(), k=6)) for _ in range(4)]
    prompts = ["".join(f" {rng.choice(phrases)}" for _ in range(6)) for _ in range(4)]
    return list(await asyncio.gather(*(ask(engine, prompt, tokens, sampling, **more) for prompt in prompts)))


def assert_drafted_alike(off: list[Answer], on: list[Answer], name: str) -> None:
    """Drafts were made, but for a grammar, and changed nothing."""
    for one, other in zip(off, on, strict=True):
        assert other.text == one.text
        assert_alike(one.logprobs, other.logprobs)
        assert (other.finished.reason, other.finished.stop) == (one.finished.reason, one.finished.stop)
        assert other.finished.completion_tokens == one.finished.completion_tokens
    assert (sum(one.finished.drafted_tokens for one in on) > 0) == (name != "grammar")  # its tokens are late


@pytest.mark.parametrize(("name", "request_fields"), REQUESTS, ids=[name for name, _ in REQUESTS])
async def test_every_field_of_a_request_means_the_same(
    small: EmbeddedEngine, name: str, request_fields: dict[str, Any]
) -> None:
    for seed in range(2):
        # Split KV: with shared cells the sums run in another order as others come and go, drafts or not.
        off = await answers(small, replace(OFF, kv_unified=False), seed, **request_fields)
        on = await answers(small, replace(NGRAM, kv_unified=False), seed, **request_fields)
        assert_drafted_alike(off, on, name)


@pytest.mark.parametrize("kind", ["ngram", "auto"])
async def test_a_real_model_repeats_a_text_as_it_does_without_drafts(engine: EmbeddedEngine, kind: Any) -> None:
    prompt = "def area(width, height):\n    return width * height\n" * 2 + "def area(width"
    await engine.retune(SETTINGS)
    off = await ask(engine, prompt, 24, logprobs=0)
    await engine.retune(replace(SETTINGS, speculative=kind))
    on = await ask(engine, prompt, 24, logprobs=0)
    assert on.text == off.text
    assert_alike(off.logprobs, on.logprobs)
    assert on.finished.accepted_tokens > 0


async def test_sampled_answers_are_distributed_as_without_drafts(small: EmbeddedEngine) -> None:
    """Two samples of 400 answers, of other seeds each; chi-square's 0.9999 quantile at 26 degrees of freedom is 62."""
    words = await bias(small)

    async def sample(settings: EngineSettings, first: int) -> Counter[str]:
        await small.retune(settings)
        prompt = " the of and the of and the of and the of and"
        seeds = range(first, first + 400)
        jobs = (ask(small, prompt, 3, Sampling(temperature=1, seed=seed, logit_bias=words)) for seed in seeds)
        return Counter([answer.text for answer in await asyncio.gather(*jobs)])

    before = drafted(small)
    off, on = await sample(OFF, 0), await sample(NGRAM, 1000)
    assert drafted(small) > before + 400
    texts = off.keys() | on.keys()
    assert len(texts) > 8
    chi_square = sum((off[text] - on[text]) ** 2 / (off[text] + on[text]) for text in texts)
    assert chi_square < 62


async def test_a_next_turn_finds_the_cells_of_the_answer(small: EmbeddedEngine) -> None:
    fields: dict[str, Any] = {"sampling": Sampling(temperature=0, logit_bias=await bias(small))}
    prompt = " the of and" * 8
    texts = {}
    for settings in (OFF, NGRAM):
        await small.retune(settings)
        first = await ask(small, prompt, 30, **fields)
        second = await ask(small, prompt + first.text + " of", 30, **fields)
        assert second.finished.cached_tokens >= second.finished.prompt_tokens - 2
        texts[settings] = (first.text, second.text)
    assert texts[OFF] == texts[NGRAM]


async def test_cells_run_short_requests_are_cancelled_and_all_others_complete(small: EmbeddedEngine) -> None:
    off = await answers(small, OFF, 5, sampling={"temperature": 0}, tokens=90)
    fields: dict[str, Any] = {"sampling": Sampling(temperature=0, logit_bias=await bias(small))}
    short = replace(NGRAM, ctx_per_slot=200, kv_cells=200)
    await small.retune(short)
    stream = small.generate(Generate(id=0, prompt=" the of" * 20, max_tokens=50, **fields))
    assert isinstance(await anext(stream), Started)
    running = asyncio.create_task(answers(small, short, 5, sampling={"temperature": 0}, tokens=90))
    await anext(stream)
    await stream.aclose()
    assert [one.text[:20] for one in await running] == [one.text[:20] for one in off]
    stats = small.status().stats
    assert stats is not None
    assert stats.preemptions > 0
    assert stats.slots_busy == 0


async def test_it_is_switched_on_and_off_under_requests(small: EmbeddedEngine) -> None:
    off = await answers(small, OFF, 6, sampling={"temperature": 0})
    seen: list[Stats] = []
    small.observe(seen.append)
    running = asyncio.create_task(answers(small, OFF, 6, sampling={"temperature": 0}))
    for settings in (NGRAM, OFF, replace(OFF, speculative="auto"), NGRAM):
        await asyncio.sleep(0.05)
        assert (await small.retune(settings)).speculative == settings.speculative
    assert [one.text for one in await running] == [one.text for one in off]
    small.observe(lambda _: None)
