"""Many requests at once: shared prefixes, short KV cells, cancelling, retuning."""

from __future__ import annotations

import asyncio
import time

import pytest
from msgspec.structs import replace

from llamaherd_server.engine.embedded import EmbeddedEngine
from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.wire.errors import EngineError
from llamaherd_server.wire.protocol import Generate, Started, Stats

from .asking import COUNTRIES, ENDLESS, Answer, ask
from .conftest import SETTINGS, computing

pytestmark = pytest.mark.asyncio(loop_scope="module")
SYSTEM = "You are a helpful assistant of the herd. " * 20
LEAST_SHARED = 150  # tokens; SYSTEM has 181


async def alone_and_together(engine: EmbeddedEngine) -> list[tuple[Answer, Answer]]:
    prompts = [f"The capital of {country} is" for country in COUNTRIES]
    alone = [await ask(engine, prompt, logprobs=5) for prompt in prompts]
    together = await asyncio.gather(*(ask(engine, prompt, logprobs=5) for prompt in prompts))
    assert " Paris" in alone[0].text
    return list(zip(alone, together, strict=True))


async def test_with_split_kv_greedy_output_in_a_batch_is_that_of_one_alone(engine: EmbeddedEngine) -> None:
    await engine.retune(replace(SETTINGS, kv_unified=False))
    for one, other in await alone_and_together(engine):
        assert one.logprobs == other.logprobs


async def test_with_unified_kv_it_leaves_that_of_one_alone_only_at_near_ties(engine: EmbeddedEngine) -> None:
    """The sums over the cells run in another order, in llama-server too: log probabilities move by up to 0.25."""
    await engine.retune(SETTINGS)
    for one, other in await alone_and_together(engine):
        pairs = zip(one.logprobs, other.logprobs, strict=False)
        if difference := next(((mine, theirs) for mine, theirs in pairs if mine.token != theirs.token), None):
            mine, theirs = difference
            rival = {candidate.token: candidate.logprob for candidate in mine.top}[theirs.token]
            assert mine.logprob - rival < 0.5


def stats_of(engine: EmbeddedEngine) -> Stats:
    stats = engine.status().stats
    assert stats is not None
    return stats


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "split"])
async def test_a_shared_prefix_is_computed_once_also_by_those_that_arrive_together(
    engine: EmbeddedEngine, unified: bool
) -> None:
    await engine.retune(replace(SETTINGS, kv_unified=unified))
    alone = await ask(engine, SYSTEM + "Number 3 says:")
    await engine.retune(replace(SETTINGS, kv_unified=unified))  # an empty cache again
    answers = await asyncio.gather(*(ask(engine, f"{SYSTEM}Number {number} says:") for number in range(4)))
    cached = sorted(answer.finished.cached_tokens for answer in answers)
    assert cached[0] == 0
    assert all(tokens >= LEAST_SHARED for tokens in cached[1:])
    assert answers[3].text == alone.text
    again = await ask(engine, SYSTEM + "Number 9 says:")
    assert again.finished.cached_tokens >= LEAST_SHARED


async def test_when_cells_run_short_sequences_are_parked_and_all_complete_as_ever(engine: EmbeddedEngine) -> None:
    await engine.retune(SETTINGS)
    prompts = [f"The long history of {country}:" for country in COUNTRIES[:4]]
    roomy = await asyncio.gather(*(ask(engine, prompt, 50, ENDLESS) for prompt in prompts))
    before = stats_of(engine).preemptions
    # The four grow to more than 4 x 50 tokens.
    await engine.retune(replace(SETTINGS, ctx_per_slot=128, kv_cells=128))
    short = await asyncio.gather(*(ask(engine, prompt, 50, ENDLESS) for prompt in prompts))
    assert stats_of(engine).preemptions > before
    assert [answer.finished.completion_tokens for answer in short] == [50] * 4
    for one, other in zip(roomy, short, strict=True):
        assert one.text[:20] == other.text[:20]


async def test_a_cancelled_prompt_frees_its_slot_and_the_rest_of_it_is_not_computed(engine: EmbeddedEngine) -> None:
    await engine.retune(replace(SETTINGS, ctx_per_slot=4096, ubatch=32))
    computed: list[int] = []
    engine.observe(lambda stats: computed.append(stats.batch_tokens))
    stream = engine.generate(Generate(id=0, prompt="word " * 3500, max_tokens=10))
    assert isinstance(await anext(stream), Started)
    await stream.aclose()
    await ask(engine, "hello", 1)
    engine.observe(lambda _: None)
    assert stats_of(engine).slots_busy == 0
    assert sum(computed) < 500


async def test_cancelling_and_retuning_stop_the_step_in_progress_and_nothing_of_it_is_lost(
    engine: EmbeddedEngine,
) -> None:
    slow = replace(SETTINGS, parallel=2, ctx_per_slot=4096, batch=2048, ubatch=2048)
    prompt = "The herd walks over the hill. " * 80
    await engine.retune(replace(slow, ubatch=256))
    expected = await ask(engine, prompt, 8, logprobs=2)
    await engine.retune(slow)
    steps: list[int] = []
    engine.observe(lambda stats: steps.append(stats.batch_tokens))
    cancelled = asyncio.create_task(ask(engine, prompt, 8))
    await computing(engine)
    cancelled.cancel()
    answer = asyncio.create_task(ask(engine, prompt, 8, logprobs=2))
    await computing(engine)
    assert max(steps, default=0) == 0
    await engine.retune(replace(slow, ubatch=256))
    assert max(steps, default=0) == 0
    tokens = [one.token for one in (await answer).logprobs]
    engine.observe(lambda _: None)
    assert tokens == [one.token for one in expected.logprobs]


async def test_a_cancelled_request_that_still_waits_never_runs(engine: EmbeddedEngine) -> None:
    await engine.retune(replace(SETTINGS, parallel=1))
    running = asyncio.create_task(ask(engine, "A long story:", 40, ENDLESS))
    waiting = asyncio.create_task(ask(engine, "Another one:", 40, ENDLESS))
    while stats_of(engine).waiting == 0:
        await asyncio.sleep(0.01)
    waiting.cancel()
    assert (await running).finished.completion_tokens == 40
    assert stats_of(engine).waiting == 0


@pytest.mark.parametrize(("before", "unified"), [(True, True), (True, False), (False, False)])
async def test_retuning_while_requests_run_loses_none_and_reports_what_is_in_force(
    engine: EmbeddedEngine, before: bool, unified: bool
) -> None:
    await engine.retune(replace(SETTINGS, kv_unified=before))
    running = [asyncio.create_task(ask(engine, f"The capital of {one} is", 60, ENDLESS)) for one in COUNTRIES[:4]]
    while stats_of(engine).slots_busy < 4:
        await asyncio.sleep(0.01)
    settings = await engine.retune(replace(SETTINGS, parallel=2, ctx_per_slot=1024, kv_unified=unified))
    assert (settings.parallel, settings.ctx_per_slot, settings.kv_unified) == (2, 1024, unified)
    assert engine.status().settings == settings
    for answer in await asyncio.gather(*running):
        assert answer.finished.completion_tokens == 60


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (replace(SETTINGS, parallel=256, ctx_per_slot=1_000_000), r"needs \d+ MiB, \d+ MiB are available"),
        (replace(SETTINGS, kv_cells=100, kv_unified=False), "kv_cells 100 needs a unified KV cache"),
        (replace(SETTINGS, parallel=1000), "cannot build this context"),
    ],
)
async def test_settings_that_do_not_fit_are_refused_and_the_old_ones_stay(
    engine: EmbeddedEngine, settings: EngineSettings, told: str
) -> None:
    before = await engine.retune(SETTINGS)
    with pytest.raises(EngineError, match=told) as error:
        await engine.retune(settings)
    assert error.value.code == "does_not_fit"
    assert engine.status().settings == before
    assert (await ask(engine, "The capital of France is", 2)).text == " Paris."


async def test_a_slot_that_would_cut_a_running_request_short_is_refused(engine: EmbeddedEngine) -> None:
    await engine.retune(SETTINGS)
    running = asyncio.create_task(ask(engine, "A long story:", 100, ENDLESS))
    began = time.monotonic()
    while stats_of(engine).slots_busy == 0 and time.monotonic() < began + 10:
        await asyncio.sleep(0.01)
    with pytest.raises(EngineError, match="needs 104 tokens, a slot would hold 64") as error:
        await engine.retune(replace(SETTINGS, ctx_per_slot=64))
    assert error.value.code == "does_not_fit"
    assert (await running).finished.completion_tokens == 100
