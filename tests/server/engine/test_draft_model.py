"""With drafts of another model the answers are those without, be they right or wrong, for every field of a request."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from msgspec.structs import replace

from llamaherd_server.engine import process
from llamaherd_server.engine.embedded import EmbeddedEngine
from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.wire.errors import EngineError
from llamaherd_server.wire.protocol import Sampling
from tests.random_models import RandomModel

from .asking import ask
from .conftest import running
from .test_speculative import OFF, REQUESTS, answers, assert_drafted_alike, drafted

pytestmark = pytest.mark.asyncio(loop_scope="module")
DRAFT = replace(OFF, speculative="draft", speculative_depth=6)
SMALL = RandomModel("dense", layers=1, width=128)
WORKER = Path(__file__).parent.parent / "eager_worker.py"


async def drafting(draft: RandomModel) -> AsyncIterator[EmbeddedEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "PROGRAM", (str(WORKER),))
        async with running(OFF, path=SMALL.path(), draft=draft.path()) as engine:
            yield engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def itself() -> AsyncIterator[EmbeddedEngine]:
    """The draft model is the model: what is most likely comes true."""
    async for engine in drafting(SMALL):
        yield engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stranger() -> AsyncIterator[EmbeddedEngine]:
    async for engine in drafting(RandomModel("dense", layers=2, width=64)):
        yield engine


async def assert_the_same(engine: EmbeddedEngine, name: str, request_fields: dict[str, Any]) -> int:
    """How many drafted tokens came true; split KV, as in test_speculative."""
    fields = {"biased": False, **request_fields}
    off = await answers(engine, replace(OFF, kv_unified=False), 1, **fields)
    on = await answers(engine, replace(DRAFT, kv_unified=False), 1, **fields)
    assert_drafted_alike(off, on, name)
    return sum(one.finished.accepted_tokens for one in on)


@pytest.mark.parametrize(("name", "request_fields"), REQUESTS, ids=[name for name, _ in REQUESTS])
async def test_every_field_means_the_same_where_drafts_come_true(
    itself: EmbeddedEngine, name: str, request_fields: dict[str, Any]
) -> None:
    accepted = await assert_the_same(itself, name, request_fields)
    assert accepted > 0 or name == "grammar"


@pytest.mark.parametrize(("name", "request_fields"), REQUESTS[:3], ids=[name for name, _ in REQUESTS[:3]])
async def test_every_field_means_the_same_where_drafts_are_wrong(
    stranger: EmbeddedEngine, name: str, request_fields: dict[str, Any]
) -> None:
    assert await assert_the_same(stranger, name, request_fields) < 20


async def test_sampled_answers_are_distributed_as_without_drafts(itself: EmbeddedEngine) -> None:
    """One of two tokens at four places; chi-square's 0.9999 quantile at 15 degrees of freedom is 45."""

    async def sample(settings: EngineSettings, first: int) -> Counter[str]:
        await itself.retune(settings)
        jobs = (ask(itself, " the of and", 4, Sampling(temperature=1, top_k=2, seed=first + n)) for n in range(400))
        return Counter([answer.text for answer in await asyncio.gather(*jobs)])

    before = drafted(itself)
    off, on = await sample(OFF, 0), await sample(DRAFT, 1000)
    assert drafted(itself) > before + 400
    texts = off.keys() | on.keys()
    assert 4 < len(texts) <= 16
    assert sum((off[text] - on[text]) ** 2 / (off[text] + on[text]) for text in texts) < 45


async def test_it_is_switched_on_and_off_under_requests(itself: EmbeddedEngine) -> None:
    fields: dict[str, Any] = {"sampling": {"temperature": 0}, "biased": False, "tokens": 200}
    off = await answers(itself, OFF, 6, **fields)
    before = drafted(itself)
    running_ones = asyncio.create_task(answers(itself, OFF, 6, **fields))
    for settings in (DRAFT, replace(OFF, speculative="ngram"), DRAFT, OFF, DRAFT):
        await asyncio.sleep(0.05)
        assert (await itself.retune(settings)).speculative == settings.speculative
    assert [one.text[:40] for one in await running_ones] == [one.text[:40] for one in off]
    assert drafted(itself) > before


async def test_a_context_without_room_for_the_draft_models_leaves_the_former(itself: EmbeddedEngine) -> None:
    await itself.retune(OFF)
    with pytest.raises(EngineError, match="MiB are available"):
        await itself.retune(replace(DRAFT, parallel=64, ctx_per_slot=2**24))
    assert (await ask(itself, " the of", 3)).finished.completion_tokens == 3
