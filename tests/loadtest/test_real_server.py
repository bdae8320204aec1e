"""Load on our own server with the real model."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import httpx

from tests.server.conftest import running

from .test_locust import locust, samples_of, summary_of, well


def test_a_search_over_both_engines_measures_each_and_puts_the_first_back(tmp_path: Path) -> None:
    short = tmp_path / "short.yml"
    short.write_text("{name: short, description: short, prompt: {median: 20}, output: {median: 8}}")
    with running(tmp_path) as server:
        before = httpx.get(f"{server.url}/admin/engine").json()
        tune = ["--url", server.url, "--model", "smollm2", "--workload", str(short), "--out", str(tmp_path / "out")]
        space = ["--space", "engine=embedded,llama-server", "--space", "parallel=2", "--budget", "40s", "--seed", "1"]
        done = subprocess.run(
            [sys.executable, "-m", "llamaherd_loadtest.tune", *tune, *space],
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        after = httpx.get(f"{server.url}/admin/engine").json()
    verdict = json.loads((tmp_path / "out" / "verdict.json").read_text())
    assert (after["engine"], after["settings"]) == ("embedded", before["settings"])
    assert verdict["current"] == {**before["settings"], "engine": "embedded"}
    assert verdict["chosen"]["engine"] in ("embedded", "llama-server")
    measured = {row["settings"]["engine"] for row in verdict["table"] if row["windows"]}
    assert measured == {"embedded", "llama-server"}
    assert any(row["label"].endswith("engine llama-server") for row in verdict["table"])


def test_an_agents_turns_with_tools_are_served_and_their_prefix_is_cached(key_file: Path, tmp_path: Path) -> None:
    engine = {"parallel": 1, "ctx_per_slot": 2560, "batch": 512, "ubatch": 512}
    with running(tmp_path, engine=engine) as server:
        more = ["-u", "1", "--requests", "2", "--workload", "agent", "--max-tokens", "4", "--seed", "1"]
        done = locust("chat.py", server, key_file, tmp_path, *more, model="smollm2")
    assert well(done), done.stderr
    assert summary_of(tmp_path)["errors"] == {}
    talk = [sample for sample in samples_of(tmp_path) if sample.index == 0]
    assert [sample.turn for sample in talk] == list(range(len(talk))) and len(talk) > 1
    for before, after in itertools.pairwise(talk):
        assert before.prompt_tokens is not None and after.prompt_tokens is not None and after.cached_tokens is not None
        assert after.prompt_tokens > before.prompt_tokens
        assert after.cached_tokens > 0.5 * before.prompt_tokens
