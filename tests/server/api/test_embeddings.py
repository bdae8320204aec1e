"""/v1/embeddings and /v1/rerank over HTTP."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import httpx
import openai
import pytest

from ..conftest import Server, running
from ..engine.tiny import write_encoder

TEXTS = ["The llama is an animal.", "Bread is baked."]


def post(server: Server, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=60)


def vectors(server: Server, **body: Any) -> list[list[float]]:
    data = post(server, "/v1/embeddings", **body).raise_for_status().json()["data"]
    assert [one["index"] for one in data] == list(range(len(data)))
    return [one["embedding"] for one in data]


def test_text_lists_and_tokens_give_the_same_vectors_and_tell_the_usage(server: Server) -> None:
    tokens = [post(server, "/tokenize", content=text, add_special=True).json()["tokens"] for text in TEXTS]
    reply = post(server, "/v1/embeddings", input=TEXTS, model="smollm2").json()
    count = sum(map(len, tokens))
    assert reply["usage"] == {"prompt_tokens": count, "total_tokens": count}
    assert (reply["object"], reply["model"]) == ("list", "smollm2")
    [first] = vectors(server, input=TEXTS[0])
    [by_tokens] = vectors(server, input=tokens[0])
    together = [one["embedding"] for one in reply["data"]]
    assert first == pytest.approx(by_tokens, abs=1e-2)
    assert first == pytest.approx(together[0], abs=1e-2)
    assert vectors(server, input=tokens)[1] == pytest.approx(together[1], abs=1e-2)


def test_fewer_dimensions_are_the_first_ones_of_length_1_again(server: Server) -> None:
    [whole] = vectors(server, input="a herd")
    [short] = vectors(server, input="a herd", dimensions=32)
    norm = math.hypot(*whole[:32])
    assert short == pytest.approx([value / norm for value in whole[:32]], abs=1e-3)
    assert math.hypot(*short) == pytest.approx(1)


def test_openais_client_reads_both_encodings(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        packed = client.embeddings.create(model="smollm2", input="a herd")  # it asks for base64 by itself
        plain = client.embeddings.create(model="smollm2", input="a herd", encoding_format="float")
    assert packed.data[0].embedding == pytest.approx(plain.data[0].embedding, abs=1e-3)


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({"input": "x", "dimensions": 577}, "dimensions", "dimensions 577 is more than the model's 576"),
        ({"input": "word " * 600}, "input", "an input has 601 tokens, the context for embeddings holds 512"),
        ({"input": ""}, "input", "the input is empty"),
        ({"input": []}, "input", "input"),
        ({"input": [[]]}, "input", "input"),
        ({"input": [1, 999999]}, "input", "token 999999 is not in the vocabulary"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "x", "model": "other"}, "model", "unknown model 'other'"),
        ({"inputs": "x"}, "inputs", "did you mean 'input'?"),
    ],
)
def test_what_cannot_be_embedded_is_refused_by_name(
    server: Server, body: dict[str, Any], param: str, told: str
) -> None:
    reply = post(server, "/v1/embeddings", **body)
    assert reply.status_code in {400, 404}
    error = reply.json()["error"]
    assert error["param"] == param
    assert told in error["message"]


def test_a_model_that_does_not_rank_says_so(server: Server) -> None:
    reply = post(server, "/v1/rerank", query="x", documents=["y"])
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "unsupported"
    assert "does not rank" in reply.json()["error"]["message"]


def test_a_ranker_orders_documents_and_refuses_everything_else(tmp_path: Path) -> None:
    path = write_encoder(tmp_path / "ranker.gguf", gguf.PoolingType.RANK)
    documents = ["a herd of llamas", "water", "the hill"]
    with running(tmp_path, model={"path": path}) as server:
        whole = post(server, "/v1/rerank", query="llama", documents=documents).raise_for_status().json()
        scores = [one["relevance_score"] for one in whole["results"]]
        assert scores == sorted(scores, reverse=True)
        assert sorted(one["index"] for one in whole["results"]) == [0, 1, 2]
        best = post(server, "/v1/rerank", query="llama", documents=documents, top_n=1, return_documents=True).json()
        assert len(best["results"]) == 1
        assert best["results"][0]["document"] == {"text": documents[whole["results"][0]["index"]]}
        scores = post(server, "/rerank", query="llama", texts=documents, return_text=True).raise_for_status().json()
        assert [(one["index"], one["score"]) for one in scores] == [
            (one["index"], one["relevance_score"]) for one in whole["results"]
        ]
        assert [one["text"] for one in scores] == [documents[one["index"]] for one in scores]
        for both in {"documents": documents, "texts": documents}, {}:
            assert post(server, "/rerank", query="llama", **both).status_code == 400
        for endpoint, body in (
            ("/v1/embeddings", {"input": "x"}),
            ("/v1/completions", {"prompt": "x", "max_tokens": 1}),
        ):
            reply = post(server, endpoint, **body)
            assert (reply.status_code, reply.json()["error"]["code"]) == (400, "unsupported")
