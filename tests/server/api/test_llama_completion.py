"""llama-server's own /completion, /infill and routes without /v1, over the double."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pytest

from llamaherd_server.api.llama_fields import SAMPLERS
from llamaherd_server.engine.base import Event
from llamaherd_server.wire.errors import EngineError
from llamaherd_server.wire.protocol import Delta, Generate, Logprob, Sampling, Started, TokenLogprob
from tests.sse import events_of

from .conftest import Serve
from .double import MODEL, Double, finished

FIM = msgspec.structs.replace(MODEL, fim=("<pre>", "<suf>", "<mid>"))


async def with_tokens(request: Generate) -> AsyncGenerator[Event, None]:
    """Two tokens, with their log probabilities where they are asked for."""
    yield Started(request.id, 5, 2)
    for number, text in enumerate(("a", "\n")):
        top = [Logprob(number, text.encode(), -0.5)]
        logprobs = None if request.logprobs is None else [TokenLogprob(number, text.encode(), -0.5, top)]
        yield Delta(id=request.id, text=text, n_tokens=1, logprobs=logprobs)
    yield finished(request, 2)


@pytest.mark.parametrize("path", ["/completion", "/completions"])
async def test_the_answer_has_llama_servers_fields(serve: Serve, path: str) -> None:
    body = {"prompt": "x", "n_predict": 2, "n_probs": 1, "return_tokens": True, "seed": 7, "top_k": 3, "stop": ["z"]}
    async with serve(Double(script=with_tokens)) as served:
        answer = (await served.http.post(path, json=body)).json()
        reply = await served.http.post(path, json={**body, "stream": True})
        plain = (await served.http.post(path, json={"prompt": "x"})).json()
    settings = answer.pop("generation_settings")
    timings = answer.pop("timings")
    [first, _] = answer.pop("completion_probabilities")
    assert answer == {
        **{"index": 0, "content": "a\n", "tokens": [0, 1], "id_slot": -1, "stop": True, "model": "double"},
        **{"tokens_predicted": 2, "tokens_evaluated": 5, "prompt": "x", "has_new_line": True, "truncated": False},
        **{"stop_type": "limit", "stopping_word": "", "tokens_cached": 7},
    }
    assert {name: settings[name] for name in ("seed", "top_k", "n_predict", "stop", "n_probs", "stream")} == {
        **{"seed": 7, "top_k": 3, "n_predict": 2, "stop": ["z"], "n_probs": 1, "stream": False},
    }
    assert (timings["prompt_n"], timings["cache_n"], timings["predicted_n"]) == (3, 2, 2)
    assert first["top_logprobs"] == [{"id": 0, "token": "a", "bytes": [97], "logprob": -0.5}]
    *chunks, last = events_of(reply.text, done=False)
    assert [(chunk["content"], chunk["tokens"], chunk["stop"]) for chunk in chunks] == [
        ("a", [0], False),
        ("\n", [1], False),
    ]
    assert (last["stop"], last["content"], last["tokens"], last["tokens_predicted"]) == (True, "", [], 2)
    assert (plain["tokens"], plain["stop_type"], "completion_probabilities" in plain) == ([], "eos", False)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("ab", ["ab"]),
        ([97, 98], [[97, 98]]),
        ([1, "ab", 2, "c"], [[1, 97, 98, 2, 99]]),
        (["ab", 7], [[1, 97, 98, 7]]),
        ({"prompt_string": "ab"}, ["ab"]),
        ([[97], "b", {"prompt_string": "c"}], [[97], "b", "c"]),
    ],
)
async def test_a_prompt_has_llama_servers_forms(serve: Serve, prompt: Any, prompts: list[Any]) -> None:
    async with serve(double := Double(tokens=1)) as served:
        own = (await served.http.post("/completion", json={"prompt": prompt})).json()
        await served.http.post("/v1/completions", json={"prompt": prompt})
    assert [request.prompt for request in double.seen] == [*prompts, *prompts]
    assert (len(own) if isinstance(own, list) else 1) == len(prompts)


async def test_only_the_fields_that_are_asked_for(serve: Serve) -> None:
    fields = ["content", "generation_settings/n_predict", "none", "content/x"]
    async with serve(Double(tokens=1)) as served:
        reply = await served.http.post("/completion", json={"prompt": "x", "n_predict": 9, "response_fields": fields})
    assert reply.json() == {"content": "w0 ", "generation_settings/n_predict": 9}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n_predictt": 1}, "n_predictt"),
        ({"post_sampling_probs": True}, "post_sampling_probs"),
        ({"dynatemp_range": 0.5}, "dynatemp_range"),
        ({"lora": [{"id": 0, "scale": 1}]}, "lora"),
        ({"grammar": 'root ::= "a"', "json_schema": {}}, "grammar"),
        ({"prompt": {"prompt_string": "x", "multimodal_data": ["AAAA"]}}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"samplers": ["top_p", "top_k"]}, "samplers"),
        ({"samplers": "ki"}, "samplers"),
    ],
)
async def test_what_cannot_be_honoured_is_refused(serve: Serve, fields: dict[str, Any], param: str) -> None:
    async with serve(double := Double()) as served:
        reply = await served.http.post("/completion", json={"prompt": "x", **fields})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert not double.seen


TURNS = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9, "model": "double"}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": TURNS,
    "/v1/completions": {"prompt": "x"},
    "/completion": {"prompt": "x"},
    "/v1/responses": {"input": "x"},
    "/v1/messages": {"messages": TURNS["messages"]},
}
OFF = {
    **{"dynatemp_range": 0, "dynatemp_exponent": 1, "top_n_sigma": -1, "adaptive_target": -1, "min_keep": 0},
    **{"t_max_predict_ms": 0, "n_indent": 0, "lora": [], "n_keep": -1, "backend_sampling": True, "verbose": False},
    **{"timings_per_token": True, "return_tokens": False, "reasoning_budget_tokens": -1, "samplers": [*SAMPLERS]},
}


@pytest.mark.parametrize("path", BODIES)
async def test_llama_servers_fields_are_taken_where_they_change_nothing(serve: Serve, path: str) -> None:
    async with serve(double := Double()) as served:
        for fields in ({}, OFF):
            assert (await served.http.post(path, json={**BODIES[path], **fields})).status_code == 200
        refused = await served.http.post(path, json={**BODIES[path], "top_n_sigma": 1.5})
    plain, off = double.seen
    assert off.sampling == plain.sampling
    assert refused.status_code == 400
    assert "top_n_sigma" in refused.json()["error"]["message"]


@pytest.mark.parametrize("samplers", [["top_k", "temp"], "kt", ["Top-K", "temperature"]])
async def test_samplers_left_out_of_the_list_are_off(serve: Serve, samplers: Any) -> None:
    async with serve(double := Double()) as served:
        await served.http.post("/completion", json={"prompt": "x", "top_p": 0.5, "samplers": samplers})
    assert double.seen[0].sampling == Sampling(top_p=1.0, min_p=0.0)


@pytest.mark.parametrize("path", BODIES)
async def test_a_models_own_defaults_are_for_what_a_request_leaves_out(serve: Serve, path: str) -> None:
    model = msgspec.structs.replace(MODEL, sampling={"temperature": 0.1, "top_k": 5, "min_p": 0.2})
    async with serve(
        double := Double(model=model), sampling={"temperature": 0.3, "seed": 7, "max_tokens": 2}
    ) as served:
        await served.http.post(path, json={**BODIES[path], "top_k": 9})
        props = (await served.http.get("/props")).json()["default_generation_settings"]["params"]
    [request] = double.seen
    assert request.sampling == Sampling(temperature=0.3, top_k=9, min_p=0.2, seed=7)
    assert request.max_tokens == (9 if "max_tokens" in BODIES[path] else 2)
    assert {name: props[name] for name in ("temperature", "top_k", "seed", "n_predict", "top_p")} == {
        **{"temperature": 0.3, "top_k": 5, "seed": 7, "n_predict": 2, "top_p": 0.95}
    }


@pytest.mark.parametrize(
    ("path", "body"), [(path, BODIES[path]) for path in ("/v1/chat/completions", "/v1/completions")]
)
async def test_verbose_shows_llama_servers_own_object(serve: Serve, path: str, body: dict[str, Any]) -> None:
    async with serve(double := Double(tokens=2)) as served:
        whole = (await served.http.post(path, json={**body, "verbose": True})).json()
        stream = await served.http.post(path, json={**body, "verbose": True, "stream": True})
        plain = (await served.http.post(path, json=body)).json()
    assert (whole["__verbose"]["prompt"], whole["__verbose"]["content"]) == (double.seen[0].prompt, "w0 w1 ")
    assert events_of(stream.text)[-1].keys() >= {"__verbose", "timings"}
    assert "__verbose" not in plain
    assert plain["system_fingerprint"] == whole["system_fingerprint"]


async def test_probabilities_are_asked_for_by_either_name(serve: Serve) -> None:
    asked = [
        *[("/v1/chat/completions", {"n_probs": 3}), ("/v1/chat/completions", {"logprobs": 3})],
        *[("/v1/completions", {"n_probs": 3}), ("/completion", {"logprobs": 3})],
    ]
    async with serve(double := Double()) as served:
        for path, fields in asked:
            assert (await served.http.post(path, json={**BODIES[path], **fields})).status_code == 200
    assert [request.logprobs for request in double.seen] == [3, 3, 3, 3]


async def test_a_stream_leaves_out_fields_at_its_end_only(serve: Serve) -> None:
    body = {"prompt": [97, 98], "stream": True, "response_fields": ["stop", "prompt"]}
    async with serve(Double(tokens=1)) as served:
        reply = await served.http.post("/completion", json=body)
    first, last = events_of(reply.text, done=False)
    assert first["content"] == "w0 "
    assert last == {"stop": True, "prompt": "ab"}


async def test_an_empty_stop_stops_nothing(serve: Serve) -> None:
    async with serve(double := Double()) as served:
        for stop in ("", ["", "zz"]):
            assert (await served.http.post("/completion", json={"prompt": "x", "stop": stop})).status_code == 200
    assert [request.stop for request in double.seen] == [[], ["zz"]]


@pytest.mark.parametrize("path", ["/completion", "/v1/completions"])
async def test_a_schema_is_a_grammar(serve: Serve, path: str) -> None:
    async with serve(double := Double()) as served:
        await served.http.post(path, json={"prompt": "x", "json_schema": {"const": "42"}})
    assert "42" in str(double.seen[0].sampling.grammar)


async def test_infill_fills_in_where_the_model_can(serve: Serve) -> None:
    gap = {"input_prefix": "def f(", "input_suffix": "): pass", "prompt": "a", "n_predict": 3}
    async with serve(double := Double(model=FIM)) as served:
        extra = [{"text": "x = 1", "filename": "a.py"}]
        assert (await served.http.post("/infill", json={**gap, "input_extra": extra})).json()["content"] == "w0 w1 w2 "
    async with serve(Double()) as served:
        refused = await served.http.post("/infill", json=gap)
    assert double.seen[0].prompt == "\n\n--- snippet ---\n\nx = 1<pre>def f(<suf>): pass<mid>a"
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported")


async def test_the_routes_without_v1_are_there(serve: Serve) -> None:
    turns = {"messages": [{"role": "user", "content": "Hello"}]}
    async with serve(double := Double()) as served:
        chat = await served.http.post("/chat/completions", json=turns)
        counted = [
            (await served.http.post(f"{prefix}/chat/completions/input_tokens", json=turns)).json()["input_tokens"]
            for prefix in ("", "/v1")
        ]
        asked = {"input": "Hello"}
        counted.append((await served.http.post("/v1/responses/input_tokens", json=asked)).json()["input_tokens"])
        models = [(await served.http.get(path)).json() for path in ("/models", "/v1/models")]
        health = [(await served.http.get(path)).status_code for path in ("/health", "/v1/health")]
        vectors = (await served.http.post("/embeddings", json={"content": ["a", "b"]})).json()
        mixed = (await served.http.post("/tokenize", json={"content": [7, "ab", "c"], "model": "double"})).json()
        pieces = (await served.http.post("/tokenize", json={"content": ["ab", 0xE5], "with_pieces": True})).json()
    assert chat.json()["object"] == "chat.completion"
    assert counted == [len(str(double.seen[0].prompt))] * 3
    assert models[0] == models[1]
    assert mixed == {"tokens": [7, 97, 98, 99]}
    assert health == [200, 200]
    assert vectors == [{"index": 0, "embedding": [[1.0]]}, {"index": 1, "embedding": [[1.0]]}]
    assert pieces == {"tokens": [{"id": 97, "piece": "a"}, {"id": 98, "piece": "b"}, {"id": 0xE5, "piece": [0xE5]}]}


async def test_a_prompt_that_is_too_long_is_told_in_numbers(serve: Serve) -> None:
    async def script(request: Generate) -> AsyncGenerator[Event, None]:
        details = {"n_prompt_tokens": 600, "n_ctx": 512}
        raise EngineError("context_length_exceeded", "the prompt has 600 tokens", "prompt", details)
        yield Started(request.id, 0, 0)

    async with serve(Double(script=script)) as served:
        error = (await served.chat()).json()["error"]
    assert (error["type"], error["code"]) == ("exceed_context_size_error", "context_length_exceeded")
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (600, 512)
