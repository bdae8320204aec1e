"""/v1/messages over the double, asked by Anthropic's own client."""

from __future__ import annotations

from typing import Any

import anthropic
import httpx
import pytest

from llamaherd_server.wire.errors import EngineError
from llamaherd_server.wire.protocol import Delta, Started

from .conftest import Serve, Served
from .double import Double
from .test_tools import CALL, TEMPLATE, saying

WEATHER: Any = {
    "name": "weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
HELLO: Any = [{"role": "user", "content": "Hello"}]


def client(served: Served) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=str(served.http.base_url), api_key="none", max_retries=0)


async def test_a_message_in_one_object(serve: Serve) -> None:
    async with serve(double := Double()) as served:
        message = await client(served).messages.create(
            model="double", max_tokens=7, system="Be brief.", messages=HELLO, stop_sequences=["STOP"]
        )
    assert message.content[0].model_dump(exclude_none=True) == {"type": "text", "text": "w0 w1 w2 "}
    assert (message.stop_reason, message.usage.input_tokens, message.usage.output_tokens) == ("end_turn", 3, 3)
    assert message.usage.cache_read_input_tokens == 2
    assert "system\nBe brief." in str(double.seen[0].prompt)
    assert (double.seen[0].max_tokens, double.seen[0].stop) == (7, ["STOP"])


async def test_a_stream_with_thinking_text_and_a_call(serve: Serve) -> None:
    double = saying("Hm.", "</think>\n\nWait.\n", *CALL, template=TEMPLATE)
    async with (
        serve(double) as served,
        client(served).messages.stream(
            model="double",
            max_tokens=9000,
            messages=HELLO,
            tools=[WEATHER],
            thinking={"type": "enabled", "budget_tokens": 1024},
        ) as stream,
    ):
        kinds = [event.type async for event in stream]
        message = await stream.get_final_message()
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    thinking, text, call = (block.model_dump() for block in message.content)
    assert (thinking["thinking"], text["text"]) == ("Hm.", "Wait.")
    assert (call["name"], call["input"]) == ("weather", {"city": "Bern"})
    assert message.stop_reason == "tool_use"
    assert message.usage.output_tokens == 2 + len(CALL)
    budget = double.seen[0].reasoning
    assert budget is not None
    assert (budget.begin, budget.end, budget.tokens, budget.begun) == ("<think>", "</think>", 1024, True)


async def test_calls_and_results_reach_the_template(serve: Serve) -> None:
    turns: Any = [
        *HELLO,
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Bern"}}],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "Rain"}]},
                {"type": "text", "text": "And now?", "cache_control": {"type": "ephemeral"}},
            ],
        },
    ]
    async with serve(double := saying("ok", template=TEMPLATE)) as served:
        await client(served).messages.create(model="double", max_tokens=5, messages=turns, tools=[WEATHER])
        forced = await client(served).messages.create(
            model="double", max_tokens=5, messages=HELLO, tools=[WEATHER], tool_choice={"type": "any"}
        )
        counted = await client(served).messages.count_tokens(model="double", messages=turns, tools=[WEATHER])
    assert str(double.seen[0].prompt).endswith("|user:Hello|assistant:[weather Bern]|tool:Rain|user:And now?|")
    assert double.seen[1].sampling.grammar
    assert forced.content
    assert counted.input_tokens == len(str(double.seen[0].prompt))


async def test_what_claude_code_sends(serve: Serve) -> None:
    cache = {"type": "ephemeral", "scope": "global"}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "Hello", "cache_control": cache}]},
        {
            "role": "assistant",
            "content": [
                {"type": "redacted_thinking", "data": "x"},
                {"type": "thinking", "thinking": "Hm.", "signature": None},
                {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {}},
                {"type": "web_search_tool_result", "tool_use_id": "s1", "content": []},
                {"type": "tool_use", "id": "t1", "name": "no such/tool", "input": {}, "caller": None},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "x", "is_error": None}]},
        {"role": "assistant", "content": []},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "And now?"},
    ]
    extras = {
        **{"defer_loading": True, "eager_input_streaming": True, "input_examples": [{}], "allowed_callers": ["direct"]},
        "cache_control": cache,
    }
    tools = [{**WEATHER, "name": "w" * 128, **extras}, {"type": "web_search_20250305", "name": "web_search"}]
    nulls = dict.fromkeys(["stop_sequences", "stream", "thinking", "metadata", "temperature", "container"])
    body = {"model": "double", "max_tokens": 9, "messages": turns, "tools": tools, "cache_control": cache, **nulls}
    async with serve(double := saying("ok", template=TEMPLATE)) as served:
        reply = await served.http.post("/v1/messages", json=body)
        image = {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x/"}}]}
        refused = await served.http.post("/v1/messages", json={**body, "messages": [image]})
    assert reply.status_code == 200, reply.text
    assert str(double.seen[0].prompt).endswith("|tool:x|assistant:|system:Be brief.|user:And now?|")
    assert (refused.status_code, "is not fetched: send the data" in refused.text) == (400, True)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("written", "read"),
    [
        ('{"city": "Be', {"raw": '{"city": "Be'}),
        ('{"city": "\\ud83d"}', {"city": "\ufffd"}),
        ('{"city": "\\ud83d\\ude00"}', {"city": "\U0001f600"}),
        ('{"city": 1e999}', {"city": None}),
        ("[]", {"raw": "[]"}),
    ],
)
async def test_a_calls_input_is_an_object_whatever_the_model_wrote(
    serve: Serve, written: str, read: dict[str, Any], stream: bool
) -> None:
    call = f'<tool_call>\n{{"name": "weather", "arguments": {written}'
    ask: Any = {"model": "double", "max_tokens": 999, "messages": HELLO, "tools": [WEATHER]}
    async with serve(saying(*call, template=TEMPLATE)) as served:
        if stream:
            async with client(served).messages.stream(**ask) as events:
                message: Any = await events.get_final_message()
        else:
            message = await client(served).messages.create(**ask)
    assert message.content[-1].input == read


async def test_a_stop_sequence_is_told(serve: Serve) -> None:
    async def script(request: Any) -> Any:
        from .double import finished

        yield Started(request.id, 5, 0)
        end = finished(request, 1)
        end.stop = "STOP"
        yield end

    async with serve(Double(script=script)) as served:
        message = await client(served).messages.create(model="double", max_tokens=5, messages=HELLO)
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "STOP")


async def test_errors_raise_what_the_client_expects(serve: Serve) -> None:
    async def broken(request: Any) -> Any:
        yield Started(request.id, 5, 0)
        yield Delta(id=request.id, text="a", n_tokens=1)
        raise EngineError("engine_crashed", "the engine died")

    async with serve(Double(script=broken), keys=None) as served:
        with pytest.raises(anthropic.NotFoundError) as missing:
            await client(served).messages.create(model="other", max_tokens=5, messages=HELLO)
        image: Any = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
        with pytest.raises(anthropic.BadRequestError, match="image_url has no data"):
            await client(served).messages.create(model="double", max_tokens=5, messages=image)
        body = {"model": "double", "max_tokens": 5, "messages": HELLO, "stream": True}
        reply: httpx.Response = await served.http.post("/v1/messages", json=body)
    assert isinstance(missing.value.body, dict)
    assert (missing.value.body["type"], missing.value.body["error"]["type"]) == ("error", "not_found_error")
    died = '{"type":"error","error":{"type":"api_error","message":"the engine died"}}'
    assert reply.text.endswith(f"event: error\ndata: {died}\n\n")
