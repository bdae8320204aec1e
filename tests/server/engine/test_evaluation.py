"""Log probabilities of given tokens beside generation: what sampling reports, whatever else runs."""

from __future__ import annotations

import asyncio
import math
from array import array
from statistics import fmean

import pytest
from msgspec.structs import replace

from llamaherd_server.engine.embedded import EmbeddedEngine
from llamaherd_server.wire.errors import EngineError
from llamaherd_server.wire.evaluation import Evaluate, EvaluatedInput

from .asking import ENDLESS, ask
from .conftest import SETTINGS, computing

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT = "The history of the llama, told at length: " * 5
NEAR = 0.04  # of a probability: llama.cpp computes few tokens by other kernels than many, over 4-bit weights
NEAR_ON_AVERAGE = 0.02


class Rows:
    """One input's answer."""

    def __init__(self, logprobs: bytes, top_tokens: bytes, top_logprobs: bytes, top: int) -> None:
        self.logprobs = array("f", logprobs)
        tokens, values = array("i", top_tokens), array("f", top_logprobs)
        self.top = [
            dict(zip(tokens[i : i + top], values[i : i + top], strict=True)) for i in range(0, len(tokens), top)
        ]

    @property
    def best(self) -> int:
        """The token that follows the last one."""
        return next(iter(self.top[-1]))


async def evaluate(
    engine: EmbeddedEngine, *inputs: tuple[list[int], int], top: int = 8, kv_types: tuple[str, str] | None = None
) -> list[Rows]:
    question = Evaluate(0, [EvaluatedInput(*one) for one in inputs], top, kv_types)
    answer = await engine.evaluate(question)
    return [Rows(one.logprobs, one.top_tokens, one.top_logprobs, top) for one in answer.evaluations]


def apart(one: Rows, other: Rows) -> float:
    """The mean difference of the tokens' probabilities."""
    pairs = zip(one.logprobs[:-1], other.logprobs[:-1], strict=True)
    return fmean(abs(math.exp(a) - math.exp(b)) for a, b in pairs)


async def test_they_are_those_of_the_answer_that_was_generated(engine: EmbeddedEngine) -> None:
    prompt = await engine.tokenize(PROMPT)
    told = await ask(engine, prompt, 24, ENDLESS, logprobs=8)
    tokens = [*prompt, *(one.token for one in told.logprobs)]
    [rows, other] = await evaluate(engine, (tokens, len(prompt)), (tokens[:-1], 1))
    assert (len(rows.logprobs), len(rows.top), len(other.top)) == (25, 25, len(tokens) - 1)
    for own, top, one in zip(rows.logprobs, rows.top, told.logprobs, strict=False):
        theirs = [math.exp(x.logprob) for x in one.top]
        assert [*map(math.exp, top.values())] == pytest.approx(theirs, abs=NEAR)
        assert top[one.token] == own
    assert math.isnan(rows.logprobs[-1])
    probabilities = [*map(math.exp, rows.logprobs[:23])]
    assert [*map(math.exp, other.logprobs[-24:-1])] == pytest.approx(probabilities, abs=NEAR)
    assert all(sum(map(math.exp, top.values())) <= 1.0001 for top in (*rows.top, *other.top))


async def test_other_kv_types_answer_otherwise_and_leave_those_in_force(engine: EmbeddedEngine) -> None:
    tokens = await engine.tokenize(PROMPT * 2)
    served, same, four = [
        (await evaluate(engine, (tokens, 1), kv_types=types))[0] for types in (None, ("f16", "f16"), ("q4_0", "q4_0"))
    ]
    assert (apart(served, same), same.top) == (0, served.top)
    assert apart(served, four) > NEAR_ON_AVERAGE / 4
    assert engine.status().settings.kv_type_k == "f16"


async def test_running_requests_do_not_notice_and_a_retune_and_a_cancel_leave_it_right(engine: EmbeddedEngine) -> None:
    tokens = await engine.tokenize(PROMPT)
    [expected] = await evaluate(engine, (tokens, 1))
    told = await ask(engine, PROMPT, 30, ENDLESS)
    generating = asyncio.create_task(ask(engine, PROMPT, 30, ENDLESS))
    cancelled = asyncio.create_task(evaluate(engine, *[(tokens, 1)] * 3))
    kept = asyncio.create_task(evaluate(engine, *[(tokens, 1)] * 2))
    await computing(engine)
    cancelled.cancel()
    await engine.retune(replace(SETTINGS, ubatch=64))
    for rows in await kept:
        assert apart(rows, expected) < NEAR_ON_AVERAGE
        assert rows.best == expected.best
    assert (await generating).text == told.text


async def test_what_cannot_be_evaluated_is_refused_alone(engine: EmbeddedEngine) -> None:
    await engine.retune(SETTINGS)
    good = await engine.tokenize("It is good.")
    for bad, told in (([*range(100, 700)], "600 tokens, a slot holds 512"), ([999999], "token 999999")):
        refused, answered = await asyncio.gather(
            evaluate(engine, (good, 1), (bad, 1)), evaluate(engine, (good, 1)), return_exceptions=True
        )
        assert isinstance(refused, EngineError)
        assert told in refused.message
        assert isinstance(answered, list)
    await engine.retune(replace(SETTINGS, flash_attention="off"))  # which quantised values need
    with pytest.raises(EngineError, match="cannot build this context"):
        await evaluate(engine, (good, 1), kv_types=("f16", "q4_0"))
