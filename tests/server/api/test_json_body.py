"""Bodies that cost more than others': refused before they are decoded, or worked on beside the event loop."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llamaherd_server.api.anthropic.messages import MessagesRequest
from llamaherd_server.config.settings import LimitSettings
from llamaherd_server.errors import ApiError
from llamaherd_server.http.json_body import MAX_CONTAINERS, MAX_STRINGS, decode
from llamaherd_server.wire.engine_settings import EngineSettings

from .conftest import Serve
from .double import Double

MESSAGE = {"role": "user", "content": "x"}
MILLION = 1_000_000


def repeated(value: str, count: int) -> str:
    return f"[{','.join([value] * count)}]"


@pytest.mark.parametrize(
    ("path", "body", "value"),
    [
        ("/detokenize", '{"tokens": $}', repeated('""', 1_300_000)),
        ("/tokenize", '{"content": $}', repeated("{}", MILLION)),
        ("/v1/messages", '{"messages": [{"role": "user", "content": $}]}', repeated("{}", MILLION)),
        ("/v1/responses", '{"input": [{"type": "reasoning", "summary": $}]}', repeated("{}", MILLION)),
        ("/v1/chat/completions", '{"response_format": {"schema": {"enum": $}}}', repeated('"ab"', 700_000)),
        ("/v1/embeddings", '{"input": $}', repeated("[]", MILLION)),
        ("/v1/completions", '{"prompt": $}', repeated("1", 2 * MILLION)),
        ("/v1/completions", "$", "[" * 600 + "]" * 600),
        ("/v1/completions", '{"prompt": "x", "temperature": $}', "NaN"),
        ("/v1/completions", '{"prompt": "x", "user": $}', "-Infinity"),
        ("/completion", '{"prompt": "x", "a": $}', ("[" * 600 + "]" * 600)),
        ("/completion", '{"prompt": "x", "a": $}', "NaN"),
    ],
)
async def test_what_costs_too_much_or_is_not_json_is_a_400(serve: Serve, path: str, body: str, value: str) -> None:
    async with serve(Double()) as served:
        reply = await served.http.post(
            path, content=body.replace("$", value), headers={"Content-Type": "application/json"}
        )
    assert (reply.status_code, reply.json().get("type", "error")) == (400, "error")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/detokenize", {"tokens": [65] * 400_000}),
        ("/tokenize", {"content": 'a, "b": [{}]\n' * 200_000}),
        ("/v1/completions", {"prompt": [7] * 200_000}),
        ("/v1/embeddings", {"input": [[1234] * 256] * 2048}),
        ("/v1/embeddings", {"input": ["some words"] * 2048}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 3}] * 4000},
        ),
    ],
)
async def test_long_requests_that_people_send_are_served(serve: Serve, path: str, body: dict[str, Any]) -> None:
    double = Double(settings=EngineSettings(ctx_per_slot=2**18))
    async with serve(double, max_body_bytes=2**24, max_queue_tokens=2**22) as served:
        reply = await served.http.post(path, json=body)
    assert reply.status_code == 200, reply.text[:300]


async def test_arguments_of_a_call_that_cost_too_much_are_passed_on_as_text(serve: Serve) -> None:
    function = {"name": "f", "arguments": f'{{"a": {repeated("{}", MAX_CONTAINERS)}}}'}
    calls = [{"id": "a", "type": "function", "function": function}]
    async with serve(Double()) as served:
        reply = await served.chat(messages=[{"role": "assistant", "content": "", "tool_calls": calls}, MESSAGE])
    assert reply.status_code == 200


def test_an_image_of_many_megabytes_is_decoded() -> None:
    url = "data:image/png;base64," + "A" * 2**25
    assert decode(json.dumps({"url": url}).encode()) == {"url": url}


@pytest.mark.parametrize("text", ["[{,", '"', '\\"', "\\"])
def test_what_stands_in_a_text_does_not_count(text: str) -> None:
    content = text * (2 * MAX_STRINGS)
    assert decode(json.dumps([content]).encode()) == [content]


@pytest.mark.parametrize(("value", "most"), [('"a"', MAX_STRINGS), ("{}", MAX_CONTAINERS - 1)])
def test_the_bounds_are_exact(value: str, most: int) -> None:
    assert len(decode(repeated(value, most).encode())) == most
    with pytest.raises(ApiError, match="more than"):
        decode(repeated(value, most + 1).encode())


def test_validation_stops_at_the_first_mistake() -> None:
    body = {"model": "x", "max_tokens": 1, "messages": [{"role": "user", "content": [{}] * 1000}] * 50}
    with pytest.raises(ValueError, match="1 validation error"):
        MessagesRequest.model_validate(body)


async def test_what_a_client_calls_a_field_or_a_model_is_not_repeated_whole(serve: Serve) -> None:
    long = "x" * (LimitSettings().max_body_bytes - 100)
    async with serve(Double()) as served:
        for field in ({long: 1}, {"model": long}):
            reply = await served.chat(**field)
            assert reply.status_code in {400, 404}
            assert len(reply.content) < 4096
