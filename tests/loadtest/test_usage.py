"""A workload and a trace out of a server's log, held against the load that was sent."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from llamaherd_loadtest.trace import TracePrompts, read_trace
from llamaherd_loadtest.usage import conversations, read_requests
from llamaherd_loadtest.workload import Calibration, load_workload
from tests.server.conftest import running

SYSTEM = 4  # blocks


def line(at: float, prompt: int, output: int, prefixes: list[int], ms: float = 1000.0, status: int = 200) -> str:
    end = f"2026-03-01T10:{int(at + ms / 1000) // 60:02d}:{(at + ms / 1000) % 60:09.6f}Z"
    counts = {"prompt_tokens": prompt, "completion_tokens": output, "prompt_chars": 4 * prompt, "prefixes": prefixes}
    return json.dumps({"timestamp": end, "event": "request", "status": status, "ms": ms} | counts)


def summed_up(log: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "llamaherd_loadtest.usage", str(log), "--out", str(log.parent)]
    return subprocess.run(argv, check=False, capture_output=True, text=True)


def test_single_requests_become_lengths_and_a_shared_prefix(tmp_path: Path) -> None:
    rng, ids = random.Random(1), itertools.count(100)
    lines = ["not a line of the server", line(0, 50, 5, [], status=500)]
    for at in range(200):
        prompt = max(300, round(800 * rng.lognormvariate(0, 0.3)))
        lines.append(line(at, prompt, 80, [1, 2, 3, 4, *itertools.islice(ids, prompt // 64 - SYSTEM)]))
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(lines))
    done = summed_up(log)
    assert done.returncode == 0, done.stderr
    found = load_workload(str(tmp_path / "workload.yml"))
    assert found.shared_prefix == SYSTEM * 64
    assert found.output.median == found.output.max == 80
    assert found.prompt.median == pytest.approx(800, rel=0.1)
    assert found.prompt.sigma == pytest.approx(0.3, rel=0.2)
    assert found.turns is None
    trace = read_trace(tmp_path / "trace.jsonl")
    assert [round(one.at) for one in trace.requests] == [*range(200)]
    assert {one.blocks for one in trace.requests} == {(1, 2, 3, 4)}
    prompts = TracePrompts(trace, model="", seed=1, calibration=Calibration(1.0, 0.0))
    texts = [json.loads(prompts.request(index))["messages"][0]["content"].split() for index in range(2)]
    assert texts[0][: SYSTEM * 64] == texts[1][: SYSTEM * 64]
    assert texts[0][SYSTEM * 64 :][:20] != texts[1][SYSTEM * 64 :][:20]


def test_prompts_that_repeat_earlier_ones_are_turns(tmp_path: Path) -> None:
    lines, ids = [], itertools.count(1)
    for chat in range(10):
        blocks, prompt = [*itertools.islice(ids, 4)], 256
        for turn in range(3):
            lines.append(line(100 * turn + chat, prompt, 64, [*blocks]))
            prompt += 64 + 128
            blocks += itertools.islice(ids, 3)
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(lines))
    assert [len(chat) for chat in conversations(read_requests(log))] == [3] * 10
    assert summed_up(log).returncode == 0
    found = load_workload(str(tmp_path / "workload.yml"))
    assert found.turns is not None
    assert (found.prompt.median, found.turns.count.median, found.turns.added.median) == (256, 3, 128)


def test_too_few_requests_are_one_line(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(line(0, 50, 5, []))
    done = summed_up(log)
    assert (done.returncode, done.stderr) == (
        2,
        f"usage: {log} has 1 answered requests, 20 are needed: give a longer log\n",
    )


def test_a_servers_log_tells_what_its_prompts_share_and_no_text(tmp_path: Path) -> None:
    system = "The llama is a domesticated South American camelid. " * 12
    with running(tmp_path, log={"prefixes": True}) as server:
        for question in range(20):
            messages = [{"role": "system", "content": system}, {"role": "user", "content": f"Secret {question}?"}]
            body: dict[str, Any] = {"messages": messages, "max_tokens": 2}
            httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).raise_for_status()
        assert server.terminate() == 0  # the last line follows the answer
    log = server.log.read_text()
    assert "Secret" not in log and "camelid" not in log
    (tmp_path / "log.jsonl").write_text(log)
    requests = read_requests(tmp_path / "log.jsonl")
    assert [len(one.prefixes) for one in requests] == [2] * 20
    assert len({one.prefixes for one in requests}) == 1
    assert summed_up(tmp_path / "log.jsonl").returncode == 0
    shared = load_workload(str(tmp_path / "workload.yml")).shared_prefix
    assert 0.5 * requests[0].prompt_tokens < shared < requests[0].prompt_tokens
