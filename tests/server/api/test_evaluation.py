"""POST /admin/logprobs over HTTP."""

from __future__ import annotations

import math
from typing import Any

import httpx
import pytest

from ..conftest import Server
from .conftest import Serve
from .double import Double


async def test_answers_are_evaluated_and_nothing_before_them(serve: Serve) -> None:
    double = Double()
    async with serve(double) as served:
        body = {"inputs": [{"prompt": "ask: ", "answer": "so"}, {"prompt": [104, 105]}], "top": 2, "kv_type_v": "q8_0"}
        reply = (await served.http.post("/admin/logprobs", json=body)).json()
    pair = [ord("s"), 0.0]
    assert reply["data"][0]["tokens"] == [*b"so"]
    assert reply["data"][0]["logprobs"] == [0.0, 0.0]
    assert [len(one) for one in reply["data"][0]["top"]] == [2, 2, 2]
    assert reply["data"][0]["top"][0] == [pair, pair]
    assert reply["data"][1]["tokens"] == [105]
    assert reply["pieces"] == {str(ord(char)): char for char in "soix"}
    assert reply["usage"] == {"prompt_tokens": 9}
    assert double.evaluated.kv_types == ("f16", "q8_0")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"inputs": []}, "inputs"),
        ({"inputs": [{"prompt": ""}]}, "a prompt is empty"),
        ({"inputs": [{"prompt": "a"}], "top": 33}, "top"),
        ({"inputs": [{"prompt": "a"}], "kv_type_k": "q3"}, "kv_type_k"),
        ({"inputs": [{"prompt": "a" * 5000}]}, "5000 evaluated positions, at most 4096"),
        ({"inputs": [{"prompt": "a" * 40000, "answer": "a"}] * 2}, "80002 tokens, at most 65536"),
    ],
)
async def test_what_is_too_much_or_wrong_is_refused(serve: Serve, body: dict[str, Any], message: str) -> None:
    async with serve(Double()) as served:
        reply = await served.http.post("/admin/logprobs", json=body)
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]


def test_a_chats_answer_is_likelier_than_another_ones(server: Server) -> None:
    chat = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
    with httpx.Client(base_url=server.url, timeout=60) as http:
        prompt = http.post("/apply-template", json=chat).json()["prompt"]
        answers = ["The capital of France is Paris.", "The capital of France is cheese."]
        body = {"inputs": [{"prompt": prompt, "answer": one} for one in answers]}
        reply = http.post("/admin/logprobs", json=body).raise_for_status().json()
    right, wrong = reply["data"]
    assert sum(right["logprobs"]) > sum(wrong["logprobs"])
    assert [reply["pieces"][str(token)] for token in right["tokens"]][-2:] == [" Paris", "."]
    token, logprob = right["top"][-1][0]
    assert reply["pieces"][str(token)] == "<|im_end|>"
    assert math.exp(logprob) > 0.5
