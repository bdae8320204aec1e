"""Preemptible requests: what they leave to others, and that they lose nothing by it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from msgspec.structs import replace

from llamaherd_server.engine.embedded import EmbeddedEngine
from llamaherd_server.wire.protocol import Delta, Finished, Generate, Sampling

from .asking import COUNTRIES, ENDLESS, GREEDY
from .conftest import SETTINGS, computing, running

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[EmbeddedEngine]:
    async with running(prompt_cache_mib=64) as started:
        yield started


class Asked:
    """A request, and what has come of it."""

    def __init__(
        self, engine: EmbeddedEngine, prompt: str, tokens: int, sampling: Sampling, *, preemptible: bool
    ) -> None:
        self.text = ""
        self.finished: Finished | None = None
        self.begun = asyncio.Event()
        request = Generate(id=0, prompt=prompt, max_tokens=tokens, sampling=sampling, preemptible=preemptible)
        self.task = asyncio.create_task(self._read(engine, request))

    async def _read(self, engine: EmbeddedEngine, request: Generate) -> None:
        async for event in engine.generate(request):
            if isinstance(event, Delta):
                self.text += event.text
                self.begun.set()
            elif isinstance(event, Finished):
                self.finished = event


def taken(engine: EmbeddedEngine) -> int:
    stats = engine.status().stats
    return stats.slots_taken if stats else 0


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "split"])
async def test_they_leave_their_slots_and_go_on_as_if_nothing_had_been(engine: EmbeddedEngine, unified: bool) -> None:
    await engine.retune(replace(SETTINGS, parallel=2, kv_unified=unified))
    prompts = [f"The long history of {country}:" for country in COUNTRIES[:2]]
    alone = []
    for prompt in prompts:
        alone.append(one := Asked(engine, prompt, 80, ENDLESS, preemptible=True))
        await one.task
    await engine.retune(replace(SETTINGS, parallel=2, kv_unified=unified))
    before = taken(engine)
    batch = [Asked(engine, prompt, 80, ENDLESS, preemptible=True) for prompt in prompts]
    await asyncio.gather(*(one.begun.wait() for one in batch))
    for number in range(3):
        other = Asked(engine, f"{number} and one is", 4, GREEDY, preemptible=False)
        await other.task
        assert not any(one.finished for one in batch)
    await asyncio.gather(*(one.task for one in batch))
    assert taken(engine) > before
    assert [one.finished.completion_tokens for one in batch if one.finished] == [80, 80]
    if not unified:  # sums over cells run in another order there, beside others
        assert [one.text for one in batch] == [one.text for one in alone]


async def test_those_that_are_not_preemptible_leave_theirs_to_nobody(engine: EmbeddedEngine) -> None:
    await engine.retune(replace(SETTINGS, parallel=1))
    before = taken(engine)
    first = Asked(engine, "The long history of tea:", 60, ENDLESS, preemptible=False)
    await first.begun.wait()
    others = [Asked(engine, "One and one is", 2, GREEDY, preemptible=kind) for kind in (True, False)]
    await asyncio.gather(*(one.begun.wait() for one in others))
    assert first.finished
    assert others[1].finished
    assert taken(engine) == before
    await asyncio.gather(first.task, *(one.task for one in others))


async def test_a_step_of_their_prompts_is_stopped_for_others(engine: EmbeddedEngine) -> None:
    await engine.retune(replace(SETTINGS, parallel=2, ctx_per_slot=2048, batch=2048, ubatch=2048))
    long = Asked(engine, "A word, a ship, a sail. " * 200, 4, GREEDY, preemptible=True)
    await computing(engine, cpu_s=0.5)
    other = Asked(engine, "One and one is", 1, GREEDY, preemptible=False)
    await other.task
    assert not long.begun.is_set()
    await long.task
    assert long.finished
    assert long.finished.completion_tokens == 4
