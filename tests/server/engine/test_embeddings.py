"""Embeddings beside generation: llama-server's vectors, and running requests that do not notice."""

from __future__ import annotations

import asyncio
import math
from array import array
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from msgspec.structs import replace

from bench import servers
from llamaherd_server.engine.embedded import EmbeddedEngine
from llamaherd_server.wire.errors import EngineError
from llamaherd_server.wire.protocol import Embed

from .asking import COUNTRIES, ENDLESS, ask
from .conftest import SETTINGS, computing

pytestmark = pytest.mark.asyncio(loop_scope="module")
SENTENCES = [f"The best dish of {country} is known to all." for country in COUNTRIES]
LONG = "A herd of llamas walks over the hill. " * 20  # several pieces of the embedding context
NEAR = 0.9995  # cosine: sums in another order, over 4-bit weights


@pytest.fixture(scope="module")
def peer() -> Iterator[httpx.Client]:
    flags = servers.Flags(parallel=1, ctx_per_slot=512, unified=True, threads=1)
    with (
        servers.llama_server(flags, "--embedding", "--pooling", "mean") as server,
        httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=120) as client,
    ):
        yield client


def theirs_of(peer: httpx.Client, inputs: list[str]) -> dict[str, Any]:
    answer: dict[str, Any] = peer.post("/v1/embeddings", json={"input": inputs}).raise_for_status().json()
    return answer


async def embed(engine: EmbeddedEngine, *inputs: str | list[int]) -> list[array[float]]:
    answer = await engine.embed(Embed(0, list(inputs)))
    return [array("f", vector) for vector in answer.vectors]


def cosine(a: array[float] | list[float], b: array[float] | list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


async def test_they_are_llama_servers_one_at_a_time_together_and_in_pieces(
    engine: EmbeddedEngine, peer: httpx.Client
) -> None:
    inputs = [*SENTENCES, LONG]
    data = theirs_of(peer, inputs)
    answer = await engine.embed(Embed(0, [*inputs]))
    assert answer.tokens == data["usage"]["prompt_tokens"]
    together = [array("f", vector) for vector in answer.vectors]
    for text, ours, one in zip(inputs, together, data["data"], strict=True):
        assert math.hypot(*ours) == pytest.approx(1)
        assert cosine(ours, one["embedding"]) > NEAR, text
    for index in (0, -1):
        [alone] = await embed(engine, inputs[index])
        assert cosine(together[index], alone) > NEAR
    assert cosine(together[0], together[-1]) < NEAR  # they are not all the same


async def test_many_inputs_and_token_lists_come_back_in_their_order(engine: EmbeddedEngine) -> None:
    texts = [f"{number} of {country}" for number in range(9) for country in COUNTRIES]  # more than fit into a batch
    tokens = [await engine.tokenize(text, add_special=True) for text in texts]
    by_text, by_tokens = await asyncio.gather(embed(engine, *texts), embed(engine, *tokens))
    single = await embed(engine, texts[68])
    assert cosine(by_text[68], single[0]) > NEAR
    assert all(cosine(one, other) > NEAR for one, other in zip(by_text, by_tokens, strict=True))
    assert cosine(by_text[0], by_text[1]) < NEAR


async def test_running_requests_and_their_cached_prefixes_do_not_notice(engine: EmbeddedEngine) -> None:
    await engine.retune(SETTINGS)
    prompt = "The history of the llama, told at length: " * 5
    expected = await ask(engine, prompt, 60, ENDLESS)
    await engine.retune(SETTINGS)
    generating = asyncio.create_task(ask(engine, prompt, 60, ENDLESS))
    while (stats := engine.status().stats) is None or stats.slots_busy == 0:
        await asyncio.sleep(0.01)
    vectors = await embed(engine, *SENTENCES, LONG)
    assert not generating.done()
    assert len(vectors) == len(SENTENCES) + 1
    assert (await generating).text == expected.text
    again = await ask(engine, prompt + "And so on", 1)
    assert again.finished.cached_tokens >= expected.finished.prompt_tokens - 2  # where the texts part


async def test_a_retune_and_a_cancel_in_the_middle_leave_the_rest_right(engine: EmbeddedEngine) -> None:
    [expected] = await embed(engine, LONG)
    cancelled = asyncio.create_task(embed(engine, *[LONG] * 3))
    kept = asyncio.create_task(embed(engine, *[LONG] * 2))
    await computing(engine)
    cancelled.cancel()
    await engine.retune(replace(SETTINGS, ubatch=64))
    for vector in await kept:
        assert cosine(vector, expected) > NEAR


async def test_inputs_that_do_not_fit_are_refused_alone(engine: EmbeddedEngine) -> None:
    await engine.retune(SETTINGS)
    bad = embed(engine, "short", "word " * 600)
    answers = await asyncio.gather(bad, embed(engine, "short"), return_exceptions=True)
    assert isinstance(answers[0], EngineError)
    assert (answers[0].code, answers[0].param) == ("context_length_exceeded", "input")
    assert "601 tokens, the context for embeddings holds 512" in answers[0].message
    assert isinstance(answers[1], list)
    for inputs, told in (([""], "the input is empty"), ([[999999]], "token 999999")):
        with pytest.raises(EngineError, match=told):
            await embed(engine, *inputs)
    with pytest.raises(EngineError, match="does not rank"):
        await engine.embed(Embed(0, ["a document"], "a query"))
