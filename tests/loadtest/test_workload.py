"""Workload files, fresh prompts, arrivals."""

from __future__ import annotations

import json
from itertools import islice, pairwise
from pathlib import Path
from statistics import fmean, median

import pytest

from llamaherd_loadtest.arrivals import Arrivals
from llamaherd_loadtest.workload import Calibration, Prompts, load_workload, workload_names

CALIBRATION = Calibration(per_word=1.25, overhead=20)


def prompts(name: str, seed: int = 1) -> Prompts:
    return Prompts(load_workload(name), model="m", seed=seed, calibration=CALIBRATION)


def content(body: bytes) -> str:
    return str(json.loads(body)["messages"][0]["content"])


@pytest.mark.parametrize("name", workload_names())
def test_prompts_are_as_long_as_the_workload_says(name: str) -> None:
    workload = load_workload(name)
    source = prompts(name)
    words = [len(content(source.request(i)).split()) - len(workload.instruction.split()) for i in range(200)]
    tokens = [CALIBRATION.overhead + CALIBRATION.per_word * count for count in words]
    assert median(tokens) == pytest.approx(workload.prompt.median, rel=0.1)
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


def test_requests_ask_for_usage_and_equal_work() -> None:
    body = json.loads(prompts("chat").request(0))
    assert body["stream_options"] == {"include_usage": True}
    assert (body["stream"], body["ignore_eos"], body["max_tokens"]) == (True, True, 32)
    assert json.loads(prompts("chat").request(0, 0.25))["max_tokens"] == 8


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
    with pytest.raises(ValueError, match="no workload 'chatt': give one of chat"):
        load_workload("chatt")


@pytest.mark.parametrize("process", ["constant", "poisson"])
def test_arrivals_keep_their_rate(process: str) -> None:
    times = list(islice(Arrivals(process, 4.0, seed=3).offsets(), 4000))  # type: ignore[arg-type]
    gaps = [b - a for a, b in pairwise(times)]
    assert fmean(gaps) == pytest.approx(0.25, rel=0.05)
    spread = fmean((gap - 0.25) ** 2 for gap in gaps) ** 0.5
    assert spread == pytest.approx(0.25 if process == "poisson" else 0.0, abs=0.02)
    assert times == list(islice(Arrivals(process, 4.0, seed=3).offsets(), 4000))  # type: ignore[arg-type]
