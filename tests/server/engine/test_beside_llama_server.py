"""The same model in llama-server, one request at a time: the same tokens and the same probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from msgspec.structs import replace

from bench import servers
from llamaherd_server.wire.protocol import Sampling

from .asking import COUNTRIES, GREEDY, ask
from .conftest import SETTINGS, running

SUBJECTS = ["The best dish of", "The capital of", "A poem about", "The weather in", "In the year 1900,", "Travel to"]
PROMPTS = [f"{subject} {country}" for subject in SUBJECTS for country in COUNTRIES] + ["def add(a, b):", "1, 2, 3, 4,"]
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 1.2, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "seed": 11},
    {"temperature": 1.0, "typical_p": 0.7, "xtc_probability": 0.5, "seed": 12},
    {"temperature": 0.7, "repeat_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2, "seed": 13},
    {"temperature": 0.9, "dry_multiplier": 0.8, "dry_allowed_length": 1, "seed": 14},
    {"temperature": 0.8, "mirostat": 1, "seed": 15},
    {"temperature": 0.8, "mirostat": 2, "seed": 16},
]


@pytest.fixture(scope="module")
def peer() -> Iterator[httpx.Client]:
    with (
        servers.llama_server(servers.Flags(parallel=1, ctx_per_slot=512, unified=True, threads=1)) as server,
        httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=120) as client,
    ):
        yield client


def complete(peer: httpx.Client, prompt: str, **fields: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "n_predict": 12, "cache_prompt": False, "return_tokens": True, **fields}
    answer: dict[str, Any] = peer.post("/completion", json=body).raise_for_status().json()
    return answer


async def test_tokens_and_probabilities_are_llama_servers(peer: httpx.Client) -> None:
    async with running(replace(SETTINGS, parallel=1)) as engine:
        assert len(PROMPTS) == 50
        for prompt in PROMPTS:
            ours = await ask(engine, prompt, 12, GREEDY, logprobs=3)
            theirs = complete(peer, prompt, temperature=0, n_probs=3)
            assert ours.text == theirs["content"]
            assert [mine.token for mine in ours.logprobs] == theirs["tokens"][: len(ours.logprobs)]
            told = iter(ours.logprobs)
            end = len(theirs["tokens"]) - len(ours.logprobs)  # 1 where the last token says that the text is over
            probabilities = theirs["completion_probabilities"]
            for one in probabilities[: len(probabilities) - end]:
                # Of a token that ends within a character it tells nothing; which prompts bring one depends on the CPU.
                mine = next(mine for mine in told if mine.token == one["id"])
                assert [top.token for top in mine.top] == [top["id"] for top in one["top_logprobs"]]
                assert mine.logprob == pytest.approx(one["logprob"], abs=1e-3)
        for fields in SAMPLINGS:
            ours = await ask(engine, PROMPTS[0], 12, Sampling(**fields))
            assert ours.text == complete(peer, PROMPTS[0], **fields)["content"], fields
