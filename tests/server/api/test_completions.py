"""/v1/completions and /tokenize over the double."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec
import pytest

from ..conftest import Server
from .conftest import Serve
from .double import MODEL, Double


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("ab", ["ab"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
async def test_a_prompt_has_four_forms(serve: Serve, prompt: Any, prompts: list[Any]) -> None:
    double = Double()
    async with serve(double) as served:
        reply = await served.http.post("/v1/completions", json={"prompt": prompt})
    assert [request.prompt for request in double.seen] == prompts
    assert len(reply.json()["choices"]) == len(prompts)
    assert reply.json()["usage"]["prompt_tokens"] == 5 * len(prompts)


async def test_choices_of_a_prompt_lie_side_by_side(serve: Serve) -> None:
    async with serve(Double(tokens=1)) as served:
        reply = await served.http.post("/v1/completions", json={"prompt": ["a", [98]], "n": 2, "echo": True})
    assert [choice["text"] for choice in reply.json()["choices"]] == ["aw0 ", "aw0 ", "bw0 ", "bw0 "]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [1, {"a": 1}]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "echo"),
        ({}, "prompt"),
    ],
)
async def test_what_cannot_be_honoured_is_refused(serve: Serve, fields: dict[str, Any], param: str) -> None:
    async with serve(Double()) as served:
        reply = await served.http.post("/v1/completions", json=fields)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


async def test_tokenize_and_back(serve: Serve) -> None:
    async with serve(Double()) as served:
        tokens = (await served.http.post("/tokenize", json={"content": "ab", "add_special": True})).json()["tokens"]
        text = (await served.http.post("/detokenize", json={"tokens": tokens[1:]})).json()["content"]
    assert (tokens, text) == ([1, 97, 98], "ab")


async def test_a_model_that_can_fills_in_the_middle(serve: Serve) -> None:
    double = Double(model=msgspec.structs.replace(MODEL, fim=("<pre>", "<suf>", "<mid>")))
    async with serve(double) as served:
        await served.http.post("/v1/completions", json={"prompt": ["def f(", "x"], "suffix": "): pass"})
        [model] = (await served.http.get("/v1/models")).json()["data"]
    assert [one.prompt for one in double.seen] == ["<pre>def f(<suf>): pass<mid>", "<pre>x<suf>): pass<mid>"]
    assert "infill" in model["capabilities"]


@pytest.mark.parametrize("most_likely", [0, 2])
def test_the_chosen_token_is_among_the_likely_ones(server: Server, most_likely: int) -> None:
    body = {"prompt": "Once", "max_tokens": 12, "temperature": 5, "top_k": 0, "min_p": 0, "logprobs": most_likely}
    logprobs = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["logprobs"]
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == logprob
        assert len(top) <= most_likely + 1
