"""Workload files, fresh prompts, conversations, replayed logs, traces, arrivals."""

from __future__ import annotations

import json
from itertools import islice, pairwise
from pathlib import Path
from statistics import fmean, median

import pytest

from llamaherd_loadtest.arrivals import Arrivals
from llamaherd_loadtest.replay import read_replay
from llamaherd_loadtest.trace import TracePrompts, read_trace
from llamaherd_loadtest.workload import Calibration, Lengths, Prompts, load_workload, workload_names

CALIBRATION = Calibration(per_word=1.25, overhead=20)


def prompts(name: str, seed: int = 1) -> Prompts:
    return Prompts(load_workload(name), model="m", seed=seed, calibration=CALIBRATION)


def content(body: bytes) -> str:
    return str(json.loads(body)["messages"][0]["content"])


@pytest.mark.parametrize("name", workload_names())
def test_prompts_are_as_long_as_the_workload_says(name: str) -> None:
    workload = load_workload(name)
    source = prompts(name)
    words = [len(content(source.request(i)).split()) for i in range(200)]
    tokens = [CALIBRATION.overhead + CALIBRATION.per_word * count for count in words]
    assert median(tokens) == pytest.approx(workload.prompt.at(0.5), rel=0.1)
    assert max(tokens) <= workload.prompt.max + 2 * CALIBRATION.per_word
    assert workload.need <= 2048, "the default context per slot"


def test_prompts_are_fresh_for_each_seed_and_index_and_repeatable() -> None:
    heads = {content(prompts("chat", seed).request(i))[:40] for seed in (1, 2) for i in range(50)}
    assert len(heads) == 100
    assert prompts("chat").request(3) == prompts("chat").request(3)


def test_a_shared_prefix_is_shared_within_a_run_only() -> None:
    one, other = (content(prompts("shared_prefix").request(i)) for i in (1, 2))
    again = content(prompts("shared_prefix", seed=2).request(1))
    shared = 400 * 5
    assert one[:shared] == other[:shared] != again[:shared]
    assert one != other


def test_requests_ask_for_usage_and_for_work_that_a_seed_repeats() -> None:
    body = json.loads(prompts("chat").request(0))
    assert body["stream_options"] == {"include_usage": True}
    assert (body["stream"], body["ignore_eos"]) == (True, True)
    assert json.loads(prompts("chat").request(0))["max_tokens"] == body["max_tokens"]
    assert json.loads(prompts("chat").request(0, 0.25))["max_tokens"] == body["max_tokens"] // 4
    assert len({json.loads(prompts("chat").request(i))["max_tokens"] for i in range(20)}) > 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\ndescription: x\nprompt: {median: 10, min: 20}\noutput: {median: 1}", "min <= median"),
        ("name: x\ndescription: x\nprompts: {median: 10}\noutput: {median: 1}", "prompts"),
        ("- a list", "Expected `object`"),
    ],
)
def test_workload_files_that_make_no_sense_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_workload(str(path))


def test_unknown_workloads_are_named_with_the_known() -> None:
    with pytest.raises(ValueError, match="unknown workload 'chatt'; available: agent, "):
        load_workload("chatt")


@pytest.mark.parametrize("process", ["constant", "poisson"])
def test_arrivals_keep_their_rate(process: str) -> None:
    times = list(islice(Arrivals(process, 4.0, seed=3).offsets(), 4000))  # type: ignore[arg-type]
    gaps = [b - a for a, b in pairwise(times)]
    assert fmean(gaps) == pytest.approx(0.25, rel=0.05)
    spread = fmean((gap - 0.25) ** 2 for gap in gaps) ** 0.5
    assert spread == pytest.approx(0.25 if process == "poisson" else 0.0, abs=0.02)
    assert times == list(islice(Arrivals(process, 4.0, seed=3).offsets(), 4000))  # type: ignore[arg-type]


def test_bursts_come_at_once_and_keep_the_rate() -> None:
    times = list(islice(Arrivals("bursts", 4.0, seed=3, burst=5).offsets(), 4000))
    assert all(len(set(times[i : i + 5])) == 1 for i in range(0, 4000, 5))
    assert len(set(times)) == 800
    assert times[-1] / 4000 == pytest.approx(0.25, rel=0.1)


@pytest.mark.parametrize(
    ("lengths", "quantiles"),
    [
        (Lengths(100, "uniform", min=50, max=150), [60, 100, 140]),
        (Lengths(100, "normal", sigma=10), [87, 100, 113]),
        (Lengths(100, "lognormal", sigma=0.5), [53, 100, 190]),
        (Lengths(100), [100, 100, 100]),
    ],
)
def test_distributions_of_lengths(lengths: Lengths, quantiles: list[int]) -> None:
    assert [lengths.at(p) for p in (0.1, 0.5, 0.9)] == quantiles


@pytest.mark.parametrize("tools", [True, False])
def test_a_conversation_repeats_all_before_it(tools: bool) -> None:
    conversation = prompts("agent" if tools else "agent_text").conversation(0)
    first = json.loads(next(conversation))
    second = json.loads(conversation.send("the answer"))
    assert ("tools" in first, "tools" in second) == (tools, tools)
    assert second["messages"][0] == first["messages"][0]
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "tool" if tools else "user"]
    assert second["messages"][1]["content"] == "the answer"
    workload = load_workload("agent")
    turns = [len(list(prompts("agent").conversation(i))) for i in range(200)]
    assert workload.turns is not None
    assert (min(turns), median(turns), max(turns)) == (2, workload.turns.count.median, workload.turns.count.max)


def test_a_log_of_requests_is_replayed_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    bodies = [{"model": "other", "messages": [{"role": "user", "content": f"q{i}"}], "top_p": 0.5} for i in range(3)]
    batch = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": bodies[2]}
    path.write_text("\n".join(json.dumps(line) for line in [*bodies[:2], batch]))
    replay = read_replay(path, 1, 0, lambda text: len(text.split())).use("mine", CALIBRATION)
    sent = [json.loads(next(replay.conversation(i))) for i in range(4)]
    assert {body["messages"][0]["content"] for body in sent[:3]} == {"q0", "q1", "q2"}
    assert sent[3] == sent[0], "from the top again"
    assert [(b["model"], b["stream"], b["top_p"]) for b in sent] == [("mine", True, 0.5)] * 4


def test_sharegpt_is_replayed_with_the_servers_answers_as_long_as_the_recorded(tmp_path: Path) -> None:
    path = tmp_path / "sharegpt.json"
    said = [("system", "s"), ("human", "one"), ("gpt", "a b c"), ("human", "two"), ("gpt", "d e")]
    path.write_text(json.dumps([{"id": "x", "conversations": [{"from": who, "value": what} for who, what in said]}]))
    replay = read_replay(path, 1, 0, lambda text: len(text.split()))
    assert replay.longest == 2 + 5
    conversation = replay.use("m", CALIBRATION).conversation(0)
    first, second = json.loads(next(conversation)), json.loads(conversation.send("real answer"))
    assert (first["max_tokens"], second["max_tokens"]) == (3, 2)
    assert [message["content"] for message in second["messages"]] == ["one", "real answer", "two"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("log.jsonl", "{}", "line 1: no `messages`"),
        ("log.jsonl", '{"messages": 1', "line 1: "),
        ("log.jsonl", "", "has no requests"),
        ("sharegpt.json", '{"a": 1}', "Expected `array`"),
    ],
)
def test_logs_that_make_no_sense_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_replay(path, 1, 0, len)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "mooncake.jsonl",
            '{"timestamp": 1000, "input_length": 600, "output_length": 4, "hash_ids": [7, 8]}\n'
            '{"timestamp": 1500, "input_length": 700, "output_length": 2, "hash_ids": [7, 9]}\n',
        ),
        (
            "azure.csv",
            "TIMESTAMP,ContextTokens,GeneratedTokens\n"
            "2023-11-16 18:17:03.9799600,600,4\n2023-11-16 18:17:04.4799600,700,2\n",
        ),
        (
            "burstgpt.csv",
            "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
            "5,GPT-4,600,4,604,API\n5.5,GPT-4,700,2,702,API\n",
        ),
    ],
)
def test_traces_give_times_and_lengths(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    trace = read_trace(path)
    assert list(trace.offsets()) == pytest.approx([0.0, 0.5])
    assert list(read_trace(path, speed=2).offsets()) == pytest.approx([0.0, 0.25])
    assert trace.longest == 702
    source = TracePrompts(trace, model="m", seed=1, calibration=CALIBRATION)
    one, other = (json.loads(source.request(i)) for i in (0, 1))
    assert (one["max_tokens"], other["max_tokens"]) == (4, 2)
    words = [body["messages"][0]["content"].split() for body in (one, other)]
    tokens = [CALIBRATION.overhead + CALIBRATION.per_word * len(each) for each in words]
    assert tokens == pytest.approx([600, 700], abs=CALIBRATION.per_word)
    block = round(512 / CALIBRATION.per_word)
    assert (words[0][:block] == words[1][:block]) is (name == "mooncake.jsonl"), "block 7 is in both prompts"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.jsonl", '{"timestamp": 1}', "line 1: .*input_length"),
        ("t.csv", "a,b\n1,2\n", "no column 'Timestamp': supported are"),
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nnow,1,1\n", "line 2: "),
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no requests"),
    ],
)
def test_traces_that_make_no_sense_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_trace(path)
