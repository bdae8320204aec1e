"""Load on our own server with the real model."""

from __future__ import annotations

import itertools
from pathlib import Path

from tests.server.conftest import running

from .test_locust import locust, samples_of, summary_of


def test_an_agents_turns_with_tools_are_served_and_their_prefix_is_cached(key_file: Path, tmp_path: Path) -> None:
    engine = {"parallel": 1, "ctx_per_slot": 2560, "batch": 512, "ubatch": 512}
    with running(tmp_path, engine=engine) as server:
        more = ["-u", "1", "--requests", "2", "--workload", "agent", "--max-tokens", "4", "--seed", "1"]
        done = locust("chat.py", server, key_file, tmp_path, *more, model="smollm2")
    assert done.returncode == 0, done.stderr
    assert summary_of(tmp_path)["errors"] == {}
    talk = [sample for sample in samples_of(tmp_path) if sample.index == 0]
    assert [sample.turn for sample in talk] == list(range(len(talk))) and len(talk) > 1
    for before, after in itertools.pairwise(talk):
        assert before.prompt_tokens is not None and after.prompt_tokens is not None and after.cached_tokens is not None
        assert after.prompt_tokens > before.prompt_tokens
        assert after.cached_tokens > 0.5 * before.prompt_tokens
