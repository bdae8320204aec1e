"""/v1/chat/completions over the double: shapes, fields, refusals."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest

from llamaherd_server.engine.base import Event
from llamaherd_server.wire.errors import EngineError
from llamaherd_server.wire.protocol import Delta, Generate, Logprob, Sampling, Started, TokenLogprob
from tests.sse import events_of

from .conftest import Serve
from .double import Double, finished

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


async def test_answers_in_openais_shape(serve: Serve) -> None:
    async with serve(Double()) as served:
        answer = (await served.chat()).json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["content"] == "w0 w1 w2 "
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


async def test_streams_role_then_text_then_end(serve: Serve) -> None:
    async with serve(Double()) as served:
        chunks = events_of((await served.chat(stream=True)).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert [delta["content"] for delta in deltas[1:-1]] == ["w0 ", "w1 ", "w2 "]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["timings"]["predicted_n"] == 3
    assert all("usage" not in chunk for chunk in chunks)


async def test_streams_usage_and_timings_on_request(serve: Serve) -> None:
    async with serve(Double()) as served:
        chunks = events_of(
            (await served.chat(stream=True, stream_options={"include_usage": True}, timings_per_token=True)).text
        )
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert chunks[-1]["timings"]["predicted_n"] == 3
    assert chunks[-1]["timings"]["predicted_per_second"] == pytest.approx(2 / 0.02)  # the first one is the prompt's
    assert chunks[0]["usage"] is None


async def test_an_event_is_one_line_whatever_the_model_writes(serve: Serve) -> None:
    said = "a\x85b\u2028c\u2029d"

    async def script(request: Generate) -> AsyncGenerator[Event, None]:
        yield Started(request.id, 5, 2)
        yield Delta(id=request.id, text=said, n_tokens=1)
        yield finished(request, 1)

    async with serve(Double(script=script)) as served:
        lines = (await served.chat(stream=True)).text.splitlines()
    deltas = [chunk["choices"][0]["delta"] for chunk in events_of("\n".join([*lines, ""]))]
    assert "".join(delta.get("content", "") for delta in deltas) == said


NULLS = (
    *("stream", "n", "logprobs", "stop", "functions", "function_call", "modalities", "verbosity", "stream_options"),
    *("model", "temperature", "top_p", "seed", "logit_bias", "max_tokens", "max_completion_tokens", "tools", "user"),
    *(
        "tool_choice",
        "response_format",
        "metadata",
        "store",
        "audio",
        "prediction",
        "web_search_options",
        "json_schema",
    ),
)


async def test_a_null_counts_as_absent(serve: Serve) -> None:
    async with serve(double := Double()) as served:
        reply = await served.chat(**dict.fromkeys(NULLS))
        required = await served.http.post("/v1/chat/completions", json={"messages": None})
    assert reply.status_code == 200
    assert double.seen[0].sampling == Sampling()
    assert required.json()["error"]["param"] == "messages"


@pytest.mark.parametrize(
    ("message", "rendered"),
    [
        ({"content": None}, "assistant\n"),
        ({"content": None, "refusal": "No."}, "assistant\nNo."),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, "assistant\nNo."),
        ({"content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]}, "assistant\na"),
        ({"content": "a", "reasoning": "r", "reasoning_details": [{"type": "x"}], "id": None, "type": None}, "nt\na"),
        (
            {"content": "a", "parsed": {"x": 1}, "annotations": [{"type": "url"}], "audio": {"id": "x"}},
            "nt\na",
        ),
        ({"tool_calls": [{"index": 0, "id": None, "type": None, "function": {"name": "f", "arguments": None}}]}, "{}"),
        ({"tool_calls": [{"id": "c", "function": {"name": "f", "arguments": {"a": 1}}}]}, '{"a": 1}'),
        ({"tool_calls": [{"id": "c", "type": "custom", "custom": {"name": "f", "input": "x"}}]}, '{"input": "x"}'),
        ({"function_call": {"name": "f", "arguments": '{"a": 1}'}}, '{"a": 1}'),
        ({"tool_calls": [{"id": "c", "function": {"name": "f", "arguments": '{"a": '}}]}, '{"raw": "{\\"a\\": "}'),
    ],
)
async def test_a_message_that_others_wrote_is_history(serve: Serve, message: dict[str, Any], rendered: str) -> None:
    async with serve(double := Double()) as served:
        reply = await served.chat(
            messages=[
                {"role": "user", "content": "x"},
                {"role": "assistant", **message},
                {"role": "user", "content": "y"},
            ]
        )
    assert reply.status_code == 200, reply.text
    assert rendered in str(double.seen[0].prompt)


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"response_format": {"type": "json_object", "schema": {"const": "42"}}}, "42"),
        ({"response_format": {"type": "json_schema", "schema": {"const": "42"}}}, "42"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": "42"}}}}, "42"),
        ({"json_schema": {"const": "42"}}, "42"),
        ({"response_format": {"type": "json_object"}}, "{"),
    ],
)
async def test_a_schema_may_stand_where_llama_server_has_it(serve: Serve, fields: dict[str, Any], grammar: str) -> None:
    async with serve(double := Double()) as served:
        assert (await served.chat(**fields)).status_code == 200
    assert grammar in str(double.seen[0].sampling.grammar)


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        ({"5": -100}, {5: -100}),
        ([[5, False], [6, 1]], {5: -1e6, 6: 1}),
        ([["a", -2]], {97: -2}),
        ({"ab": False}, {97: -1e6, 98: -1e6}),
    ],
)
async def test_a_bias_may_be_on_text_and_forbid(serve: Serve, bias: Any, expected: dict[int, float]) -> None:
    async with serve(double := Double()) as served:
        assert (await served.chat(logit_bias=bias)).status_code == 200
    assert double.seen[0].sampling.logit_bias == expected


async def test_a_last_assistant_turn_is_continued_by_vllms_fields_too(serve: Serve) -> None:
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Sure"}]
    async with serve(double := Double()) as served:
        await served.chat(messages=turns, continue_final_message=True, add_generation_prompt=False)
        both = await served.chat(messages=turns, continue_final_message=True, add_generation_prompt=True)
        nothing = await served.chat(continue_final_message=True)
    assert str(double.seen[0].prompt).endswith("assistant\nSure")
    assert (both.status_code, nothing.status_code) == (400, 400)


async def test_fields_that_cannot_change_the_answer_are_ignored(serve: Serve) -> None:
    ignored = {
        **{"user": "u", "metadata": {"a": 1}, "store": True, "service_tier": "auto", "prompt_cache_retention": "24h"},
        **{"id_slot": 0, "return_progress": True, "verbosity": "low", "max_completion_tokens": -1, "model": ""},
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    async with serve(Double()) as served:
        assert (await served.chat(**ignored)).status_code == 200


async def test_n_choices_run_at_once_with_seeds_of_their_own(serve: Serve) -> None:
    double = Double(pace_s=0.01)
    async with serve(double) as served:
        answer = (await served.chat(n=3, seed=7)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [request.sampling.seed for request in double.seen] == [7, 8, 9]
    assert double.most_running == 3
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (5, 9)


async def test_every_sampling_field_reaches_the_engine(serve: Serve) -> None:
    sampling: dict[str, Any] = {
        **{"temperature": 0.1, "top_k": 3, "top_p": 0.2, "min_p": 0.3, "typical_p": 0.4, "xtc_probability": 0.5},
        **{"xtc_threshold": 0.6, "repeat_penalty": 1.1, "repeat_last_n": 9, "presence_penalty": 0.7},
        **{"frequency_penalty": 0.8, "dry_multiplier": 0.9, "dry_base": 1.5, "dry_allowed_length": 4},
        **{"dry_penalty_last_n": 5, "dry_sequence_breakers": ["x"], "mirostat": 2, "mirostat_tau": 4.0},
        **{"mirostat_eta": 0.2, "seed": 11, "ignore_eos": True, "grammar": 'root ::= "a"'},
    }
    double = Double()
    async with serve(double) as served:
        reply = await served.chat(**sampling, logit_bias={"5": -100}, stop="end", max_tokens=2, cache_prompt=False)
    assert reply.status_code == 200
    request = double.seen[0]
    assert {name: getattr(request.sampling, name) for name in sampling} == sampling
    assert request.sampling.logit_bias == {5: -100}
    assert (request.stop, request.max_tokens, request.cache_prompt) == (["end"], 2, False)
    assert set(sampling) | {"logit_bias"} == set(request.sampling.__struct_fields__)


async def test_logprobs_have_openais_form(serve: Serve) -> None:
    async def script(request: Generate) -> AsyncGenerator[Event, None]:
        yield Started(request.id, 5, 2)
        token = TokenLogprob(7, b"\xc3", -0.5, [Logprob(7, b"\xc3", -0.5), Logprob(8, b"b", -1.5)])
        yield Delta(id=request.id, text="", n_tokens=1, logprobs=[token])
        yield finished(request, 1)

    async with serve(Double(script=script)) as served:
        whole = (await served.chat(logprobs=True, top_logprobs=2)).json()["choices"][0]["logprobs"]["content"]
        streamed = events_of((await served.chat(logprobs=True, top_logprobs=2, stream=True)).text)[1]["choices"][0][
            "logprobs"
        ]
    assert whole[0]["bytes"] == [0xC3]
    assert [one["logprob"] for one in whole[0]["top_logprobs"]] == [-0.5, -1.5]
    assert streamed["content"] == whole


async def test_parts_are_joined_and_a_last_assistant_turn_is_continued(serve: Serve) -> None:
    double = Double()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Sure"}]
    async with serve(double) as served:
        await served.chat(messages=messages)
    assert double.seen[0].prompt == "<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\nSure"


@pytest.mark.parametrize(
    ("fields", "status", "param", "message"),
    [
        ({"temperatur": 1}, 400, "temperatur", "did you mean 'temperature'?"),
        ({"messages": [{"role": "user", "contnt": "x"}]}, 400, "messages.0", "content is missing"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, 400, "messages.0.role", "'assistant'"),
        ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, 400, "temperature", "valid number"),
        ({"temperature": True}, 400, "temperature", "must be a number, not a boolean"),
        ({"max_tokens": True}, 400, "max_tokens", "must be a number, not a boolean"),
        ({"logit_bias": {"5": True}}, 400, "logit_bias.5", "must be a number, not a boolean"),
        ({"messages": []}, 400, "messages", "at least 1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "messages",
            "image_url has no data",
        ),
        ({"tool_choice": "required"}, 400, "tool_choice", "needs tools"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "wether"}}},
            *(400, "tool_choice", "unknown tool"),
        ),
        ({"tools": [WEATHER], "tool_choice": "required", "grammar": "root ::= []"}, 400, "grammar", "be combined with"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0", "content is missing"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0", "tool_call_id"),
        ({"functions": [{"name": "f"}]}, 400, "functions", "send tools"),
        ({"top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
        ({"max_tokens": 0}, 400, "max_tokens", "at least 1"),
        ({"stop": ["x" * 1025]}, 400, "stop.0", "at most 1024 characters"),
        ({"chat_template_kwargs": {"enable_thinking": "false"}}, 400, "chat_template_kwargs", "true or false"),
        ({"grammar": "root ::= \0"}, 400, "grammar", "NUL"),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format", "json_schema"),
        ({"model": "gpt-4"}, 404, "model", "available: 'double'"),
    ],
)
async def test_what_cannot_be_honoured_is_refused(
    serve: Serve, fields: dict[str, Any], status: int, param: str, message: str
) -> None:
    double = Double()
    async with serve(double) as served:
        reply = await served.chat(**fields)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (status, param)
    assert message in error["message"]
    assert not double.seen


@pytest.mark.parametrize(
    ("body", "content_type", "code"),
    [
        (b'{"messages": [', "application/json", "invalid_json"),
        (b"[" * 100_000, "application/json", "body_too_complex"),
        (b'{"a": "\xff"}', "application/json", "invalid_json"),
        (b"{}", "text/plain", "invalid_content_type"),
        (b"", "application/json", "invalid_json"),
        (b"[]", "application/json", "invalid_value"),
    ],
)
async def test_a_malformed_body_is_a_400(serve: Serve, body: bytes, content_type: str, code: str | None) -> None:
    async with serve(Double()) as served:
        reply = await served.http.post("/v1/chat/completions", content=body, headers={"Content-Type": content_type})
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == code


async def test_a_body_over_the_limit_is_a_413_announced_or_not(serve: Serve) -> None:
    async def pieces() -> AsyncGenerator[bytes, None]:
        for _ in range(8):
            yield b" " * 1024

    async with serve(Double(), max_body_bytes=4096) as served:
        headers = {"Content-Type": "application/json"}
        announced = await served.http.post("/v1/chat/completions", content=b" " * 8192, headers=headers)
        chunked = await served.http.post("/v1/chat/completions", content=pieces(), headers=headers)
    assert (announced.status_code, chunked.status_code) == (413, 413)
    assert announced.json()["error"]["code"] == chunked.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (EngineError("context_length_exceeded", "600 tokens do not fit into 512", "messages"), 400),
        (EngineError("invalid_grammar", "no root", "grammar"), 400),
        (EngineError("engine_crashed", "the engine crashed"), 500),
        (EngineError("internal", "oops"), 500),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_engines_error_before_the_first_token_is_a_status(
    serve: Serve, error: EngineError, status: int, stream: bool
) -> None:
    async def script(request: Generate) -> AsyncGenerator[Event, None]:
        raise error
        yield Started(request.id, 0, 0)

    async with serve(Double(script=script)) as served:
        reply = await served.chat(stream=stream)
    assert reply.status_code == status
    assert reply.json()["error"]["code"] == error.code


async def test_a_crash_in_mid_stream_is_an_error_event_and_ends_the_stream(serve: Serve) -> None:
    async def script(request: Generate) -> AsyncGenerator[Event, None]:
        yield Started(request.id, 5, 2)
        yield Delta(id=request.id, text="half", n_tokens=1)
        raise EngineError("engine_crashed", "the engine crashed")

    async with serve(Double(script=script)) as served:
        reply = await served.chat(stream=True)
        again = await served.chat(stream=True)
    assert events_of(reply.text, done=False)[-1]["error"]["code"] == "engine_crashed"
    assert again.status_code == 200


@pytest.mark.parametrize("name", ["double", "gpt-4", "", None])
async def test_a_model_with_any_name_answers_with_its_own(serve: Serve, name: str | None) -> None:
    async with serve(Double(), aliases=None) as served:
        reply = await served.chat(model=name)
        listed = (await served.http.get("/v1/models")).json()["data"]
    assert (reply.status_code, reply.json()["model"]) == (200, "double")
    assert [(model["id"], model["aliases"]) for model in listed] == [("double", [])]


async def test_an_empty_name_is_no_name(serve: Serve) -> None:
    async with serve(Double()) as served:
        assert (await served.chat(model="")).status_code == 200
