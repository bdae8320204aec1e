"""What the engine answers: the right tokens, whole characters, every sampling field, and failures that stay alone."""

from __future__ import annotations

import asyncio

import pytest

from llamaherd_server.engine.embedded import EmbeddedEngine
from llamaherd_server.wire.errors import EngineError
from llamaherd_server.wire.protocol import ReasoningBudget, Sampling

from .asking import ENDLESS, Answer, ask

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize("text", ["😀🤖👩‍🚀 ü€", "日本語"])
async def test_characters_of_many_tokens_are_never_split(engine: EmbeddedEngine, text: str) -> None:
    grammar = Sampling(temperature=0, grammar=f'root ::= "{text}"')
    answer = await ask(engine, "Emoji:", sampling=grammar, max_tokens=64)
    assert answer.text == text
    assert answer.finished.completion_tokens > len(text)
    assert not any("\ufffd" in part for part in answer.parts)


async def test_stop_strings_end_the_output_and_do_not_show(engine: EmbeddedEngine) -> None:
    prompt = "Count: one, two, three, four,"
    free = (await ask(engine, prompt, sampling=ENDLESS)).text
    stop = free[7:12]  # it begins and ends within tokens
    answer = await ask(engine, prompt, sampling=ENDLESS, stop=["never said", stop])
    assert (answer.finished.reason, answer.finished.stop) == ("stop", stop)
    assert answer.text == free[: free.index(stop)]


async def test_a_grammar_is_kept_to_and_a_bad_one_fails_alone(engine: EmbeddedEngine) -> None:
    question = "Is water wet? Answer:"
    good = ask(engine, question, sampling=Sampling(grammar='root ::= " yes" | " no"'))
    bad = ask(engine, question, sampling=Sampling(grammar="root ::= missing"))
    dead_end = ask(engine, question, sampling=Sampling(grammar='root ::= "yes"', ignore_eos=True))
    plain = ask(engine, "The capital of France is")
    answer, error, stuck, other = await asyncio.gather(good, bad, dead_end, plain, return_exceptions=True)
    assert isinstance(answer, Answer)
    assert answer.text in (" yes", " no")
    for failure in (error, stuck):
        assert isinstance(failure, EngineError)
        assert (failure.code, failure.param) == ("invalid_grammar", "grammar")
    assert isinstance(other, Answer)


@pytest.mark.parametrize("grammar", ["root ::= zebra-rule", 'root ::= "zebra', 'root ::= root "zebra"'])
async def test_nothing_of_a_grammar_that_does_not_compile_reaches_the_log(
    engine: EmbeddedEngine, capfd: pytest.CaptureFixture[str], grammar: str
) -> None:
    with pytest.raises(EngineError, match="does not compile"):
        await ask(engine, "secret", sampling=Sampling(grammar=grammar))
    await ask(engine, "x", 1)  # what the worker wrote before has been passed on
    assert "zebra" not in capfd.readouterr().err


async def test_the_same_seed_gives_the_same_output_and_none_gives_any(engine: EmbeddedEngine) -> None:
    seeds = (7, 7, 8, None, None)
    texts = [(await ask(engine, "Once upon", sampling=Sampling(temperature=1.5, seed=seed))).text for seed in seeds]
    assert texts[0] == texts[1] != texts[2]
    assert texts[3] != texts[4]


FIELDS = [
    Sampling(temperature=1.5, top_k=1),
    Sampling(temperature=1.5, top_p=0.0001),
    Sampling(temperature=1.5, min_p=0.99),
    Sampling(temperature=0, mirostat=2),
]


@pytest.mark.parametrize("sampling", FIELDS)
async def test_cuts_that_leave_one_candidate_are_greedy(engine: EmbeddedEngine, sampling: Sampling) -> None:
    prompt = "The capital of Japan is"  # 4 tokens on, the next two candidates are all but equal
    assert (await ask(engine, prompt, 4, sampling)).text == (await ask(engine, prompt, 4)).text


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0, repeat_penalty=1.8),
        Sampling(temperature=0, presence_penalty=2.0),
        Sampling(temperature=0, frequency_penalty=2.0),
        Sampling(temperature=0, dry_multiplier=2.0),
        Sampling(temperature=0, dry_multiplier=2.0, dry_penalty_last_n=-1),
    ],
)
async def test_penalties_see_the_prompt_and_break_repetition(engine: EmbeddedEngine, sampling: Sampling) -> None:
    prompt = "sheep sheep sheep sheep sheep sheep sheep sheep"
    assert (await ask(engine, prompt, 8)).text.count("sheep") == 8
    assert (await ask(engine, prompt, 8, sampling)).text.count("sheep") < 8


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, typical_p=0.2, seed=1),
        Sampling(temperature=1.0, xtc_probability=1.0, seed=1),
        Sampling(temperature=1.0, mirostat=1, seed=1),
        Sampling(temperature=1.0, mirostat=2, mirostat_tau=9.0, seed=1),
    ],
)
async def test_what_shapes_the_choice_changes_it(engine: EmbeddedEngine, sampling: Sampling) -> None:
    plain = Sampling(temperature=1.0, seed=1)
    assert (await ask(engine, "Once", sampling=sampling)).text != (await ask(engine, "Once", sampling=plain)).text


async def test_bias_decides_and_ignore_eos_runs_on(engine: EmbeddedEngine) -> None:
    [rome] = await engine.tokenize(" Rome")
    biased = await ask(engine, "The capital of France is", 1, Sampling(temperature=0, logit_bias={rome: 100.0}))
    assert biased.text == " Rome"
    endless = await ask(engine, "<|im_end|>", 40, ENDLESS)
    assert (endless.finished.reason, endless.finished.completion_tokens) == ("length", 40)


async def test_logprobs_are_a_distribution_and_greedy_takes_its_mode(engine: EmbeddedEngine) -> None:
    answer = await ask(engine, "The capital of France is", max_tokens=5, logprobs=3)
    assert len(answer.logprobs) == 5
    for chosen in answer.logprobs:
        assert [chosen.token, chosen.text] == [chosen.top[0].token, chosen.top[0].text]
        assert 0 >= chosen.top[0].logprob >= chosen.top[1].logprob >= chosen.top[2].logprob
        assert len(chosen.top) == 3


async def test_tokens_make_the_text_that_they_came_from(engine: EmbeddedEngine) -> None:
    text = "Hello <|im_end|> wörld 🐑"
    tokens = await engine.tokenize(text)
    assert await engine.detokenize(tokens) == text
    pieces = await engine.pieces(tokens)
    assert (len(pieces), b"".join(pieces)) == (len(tokens), text.encode())


async def test_without_max_tokens_the_slot_is_the_limit(engine: EmbeddedEngine) -> None:
    answer = await ask(engine, "word " * 500, None, ENDLESS)
    assert answer.finished.reason == "length"
    assert answer.finished.prompt_tokens + answer.finished.completion_tokens == 512


@pytest.mark.parametrize(
    ("prompt", "sampling", "code", "told"),
    [
        ("x " * 600, Sampling(), "context_length_exceeded", "601 tokens, a slot holds 512"),
        ([], Sampling(), "invalid_value", "empty"),
        ([1, 999999], Sampling(), "invalid_value", "token 999999"),
        ("half a pair \ud800", Sampling(), "invalid_value", "surrogate"),
        ("x", Sampling(logit_bias={999999: 1.0}), "invalid_value", "token 999999"),
        ("x", Sampling(repeat_penalty=0.0), "invalid_value", "repeat_penalty 0.0"),
        ("x", Sampling(mirostat=3), "invalid_value", "mirostat 3"),
    ],
)
async def test_what_cannot_be_done_is_refused_with_the_value(
    engine: EmbeddedEngine, prompt: str | list[int], sampling: Sampling, code: str, told: str
) -> None:
    with pytest.raises(EngineError, match=told) as error:
        await ask(engine, prompt, sampling=sampling)
    assert error.value.code == code


@pytest.mark.parametrize(
    ("prompt", "begun", "before", "grammar"),
    [
        ("<think>", True, "", None),
        ("<think>", True, "", 'root ::= [^<]+ "</think>" " yes"'),
        # this model begins to think where a grammar has it do so
        ("Think: ", False, "<think>", 'root ::= "<think>" [^<]+ "</think>" " yes"'),
    ],
)
async def test_reasoning_ends_where_its_budget_does(
    engine: EmbeddedEngine, prompt: str, begun: bool, before: str, grammar: str | None
) -> None:
    budget = ReasoningBudget(begin="<think>", end="</think>", tokens=5, begun=begun)
    sampling = Sampling(temperature=0, grammar=grammar, logit_bias={} if grammar else {**ENDLESS.logit_bias})
    answer = await ask(engine, prompt, max_tokens=24, sampling=sampling, reasoning=budget)
    thought, marker, rest = answer.text.removeprefix(before).partition("</think>")
    assert marker
    assert 0 < len(thought.split()) <= 5
    assert rest == " yes" if grammar else rest


async def test_without_room_for_reasoning_there_is_none(engine: EmbeddedEngine) -> None:
    budget = ReasoningBudget(begin="<think>", end="</think>", tokens=0, begun=True)
    answer = await ask(engine, "<think>", max_tokens=12, sampling=ENDLESS, reasoning=budget)
    assert answer.text.startswith("</think>")
    assert answer.text.count("</think>") == 1
