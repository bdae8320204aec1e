"""Requests that cost too much or that llama.cpp dies of, beside a stream of another client that they must not touch."""

from __future__ import annotations

import asyncio
import random
import string
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from llamaherd_server.engine.embedded import EmbeddedEngine
from llamaherd_server.process.turns import caller
from llamaherd_server.wire.errors import EngineError
from llamaherd_server.wire.protocol import Delta, Generate, Sampling

from .asking import ENDLESS, Answer, ask

pytestmark = pytest.mark.asyncio(loop_scope="module")

INT32 = 2**31 - 1
_rng = random.Random(1)
WORDS = sorted({"".join(_rng.choices(string.ascii_lowercase, k=7)) for _ in range(1000)})


def doubled(times: int) -> str:
    return "\n".join(["root ::= r0", *(f"r{n} ::= r{n + 1} r{n + 1}" for n in range(times)), f'r{times} ::= "a" | ""'])


# What each is refused for.
GRAMMARS = {
    "nested": ("root ::= " + "(" * 200_000 + '"a"' + ")" * 200_000, "nested too deeply"),
    "nested and open": ("root ::= " + "(" * 200_000, "nested too deeply"),
    "doubled": (doubled(40), "CPU time"),
    "bounds past int64": ('root ::= "a"{99999999999999999999999}', "compile"),
    "huge bounds": ('root ::= "a"{100000}', "repetitions"),
    "empty bounds": ('root ::= "a"{}', "expecting an int"),
    "60,000 alternatives": ("root ::= " + " | ".join(f'"a{n}"' for n in range(60_000)), "CPU time"),
    "optional items": ("root ::= " + "e " * 3000 + '\ne ::= "a" | "b" | ""', "takes too much CPU time"),
    "left recursion": ('root ::= root "zebra" | "a"', "left recursion"),
    "hidden left recursion": ('root ::= e root "a"\ne ::= "b" | ""', "left recursion"),
    "undefined": ("root ::= missing", "missing"),
    "not a grammar": ("zebra", "::="),
    "no root": ('start ::= "a"', "root"),
    "a token that there is not": ("root ::= <[99999999]>", "no token"),
}


@asynccontextmanager
async def beside_a_stream(engine: EmbeddedEngine) -> AsyncIterator[None]:
    """The engine streams to another client all the while, and has not been started again."""
    before = engine.status().restarts
    tokens = 0

    async def stream() -> None:
        nonlocal tokens
        request = Generate(id=0, prompt="A story:", max_tokens=400, sampling=ENDLESS, owner="other")
        while True:
            async for event in engine.generate(request):
                tokens += isinstance(event, Delta)

    async def more() -> None:
        now = tokens
        while tokens == now:
            assert not streaming.done()
            await asyncio.sleep(0.01)

    streaming = asyncio.create_task(stream())
    await more()
    try:
        yield
        await more()
        assert engine.status().restarts == before
    finally:
        streaming.cancel()


@pytest.mark.parametrize("kind", GRAMMARS)
async def test_a_hostile_grammar_fails_alone(engine: EmbeddedEngine, kind: str) -> None:
    grammar, told = GRAMMARS[kind]
    async with beside_a_stream(engine):
        with pytest.raises(EngineError, match=told) as error:
            await ask(engine, "x", sampling=Sampling(grammar=grammar))
    assert (error.value.code, error.value.param) == ("invalid_grammar", "grammar")
    assert len(error.value.message) < 400


async def test_a_grammar_that_gets_costly_later_fails_when_it_does(engine: EmbeddedEngine) -> None:
    grammar = 'root ::= "Well, well: " ' + "e " * 1500 + '\ne ::= "a" | "b" | ""'
    async with beside_a_stream(engine):
        with pytest.raises(EngineError, match="for a token") as error:
            await ask(engine, "x", 200, Sampling(grammar=grammar, temperature=0, ignore_eos=True))
    assert error.value.code == "invalid_grammar"


async def test_a_choice_of_a_thousand_words_is_made(engine: EmbeddedEngine) -> None:
    grammar = "root ::= " + " | ".join(f'"{word}"' for word in WORDS)
    async with beside_a_stream(engine):
        answer = await ask(engine, "A word:", sampling=Sampling(grammar=grammar, temperature=0))
    assert answer.text in WORDS


async def test_a_grammar_has_logprobs_of_the_models_own(engine: EmbeddedEngine) -> None:
    free = await ask(engine, "The capital of France is", 2, logprobs=2)
    held = await ask(engine, "The capital of France is", 2, Sampling(temperature=0, grammar="root ::= .*"), logprobs=2)
    assert [one.token for one in held.logprobs] == [one.token for one in free.logprobs]
    assert [one.logprob for one in held.logprobs] == pytest.approx([one.logprob for one in free.logprobs], abs=1e-3)


YES = 'root ::= " yes" | " no"'
VALUES = {
    "repeat_last_n": Sampling(repeat_penalty=1.1, repeat_last_n=INT32),
    "dry_penalty_last_n": Sampling(dry_multiplier=1, dry_penalty_last_n=INT32),
    "dry_allowed_length": Sampling(dry_multiplier=1, dry_allowed_length=INT32),
    "top_k": Sampling(top_k=INT32),
    "temperature": Sampling(temperature=1e-38),
    "no temperature": Sampling(temperature=-1),
    "bias at the end": Sampling(logit_bias={5: 3e38, 6: -3e38}, grammar=YES),
    "bias past the end": Sampling(logit_bias={5: float("inf"), 6: float("-inf")}, grammar=YES),
    "bias past a float's end": Sampling(logit_bias={5: 1e300}),
}
REFUSED = {
    "nan bias": (Sampling(logit_bias={5: float("nan")}, grammar=YES), "logit_bias"),
    "nan temperature": (Sampling(temperature=float("nan")), "temperature"),
    "infinite temperature": (Sampling(temperature=float("inf")), "temperature"),
    "nan top_p": (Sampling(top_p=float("nan")), "top_p"),
    "repeat_penalty": (Sampling(repeat_penalty=1e-40), "repeat_penalty"),
    "presence_penalty": (Sampling(presence_penalty=3e38), "presence_penalty"),
    "dry_base": (Sampling(dry_multiplier=1, dry_base=float("inf")), "dry_base"),
    "breakers": (
        Sampling(dry_multiplier=1, dry_sequence_breakers=[f"{n} " * 300 for n in range(64)]),
        "dry_sequence_breakers",
    ),
}


@pytest.mark.parametrize("name", VALUES)
async def test_values_at_a_types_end_mean_what_the_nearest_one_does(engine: EmbeddedEngine, name: str) -> None:
    assert (await ask(engine, "Is water wet? Answer:", 3, VALUES[name])).finished.completion_tokens


@pytest.mark.parametrize("name", REFUSED)
async def test_values_without_a_meaning_are_refused(engine: EmbeddedEngine, name: str) -> None:
    sampling, field = REFUSED[name]
    with pytest.raises(EngineError, match=field) as error:
        await ask(engine, "x", 3, sampling)
    assert (error.value.code, error.value.param) == ("invalid_value", field)


async def test_slow_preparation_holds_up_nobody_and_ends_with_its_client(engine: EmbeddedEngine) -> None:
    slow = [
        asyncio.create_task(ask(engine, "x", sampling=Sampling(grammar=f'{doubled(40)}\nx{n} ::= ""')))
        for n in range(6)
    ]
    await asyncio.sleep(0)
    async with beside_a_stream(engine):
        assert isinstance(await ask(engine, "The capital of France is", 2), Answer)
        assert await engine.tokenize("a herd")
        assert not any(one.done() for one in slow)
    for one in slow:
        one.cancel()
    await asyncio.gather(*slow, return_exceptions=True)
    assert (await ask(engine, "Wet?", 3, Sampling(grammar=YES))).text in (" yes", " no")


async def test_a_text_far_beyond_the_context_is_refused_without_its_tokens(engine: EmbeddedEngine) -> None:
    with pytest.raises(EngineError, match=r"at least \d+ tokens, a slot holds 512") as error:
        await ask(engine, "zebra " * 2**18)
    assert error.value.code == "context_length_exceeded"


async def test_one_callers_texts_leave_a_lane_to_the_others(engine: EmbeddedEngine) -> None:
    def of(name: str, text: str) -> asyncio.Task[int]:
        caller.set(name)
        return asyncio.create_task(engine.count_tokens(text))

    many = [of("one", "a" * 2**21) for _ in range(4)]
    other = of("other", "a" * 2**15)
    assert await other == 2**13
    assert not many[-1].done()
    assert await asyncio.gather(*many) == [2**19] * 4


async def test_a_texts_tokens_are_given_only_as_far_as_they_are_bounded(engine: EmbeddedEngine) -> None:
    with pytest.raises(EngineError, match="the text has 600000 tokens, more than 262144: send it in parts"):
        await engine.tokenize("<|im_start|>" * 600_000)
    assert await engine.count_tokens("<|im_start|>" * 300_000) == 300_000


@pytest.mark.parametrize("text", ["<|im_start|>" * 20_000, "word <|im_end|>\n" * 20_000, "a" * 2**20, "zebra " * 2**16])
async def test_long_texts_are_tokenised_piece_by_piece_as_in_one_go(engine: EmbeddedEngine, text: str) -> None:
    async with beside_a_stream(engine):
        assert await engine.detokenize(await engine.tokenize(text)) == text
