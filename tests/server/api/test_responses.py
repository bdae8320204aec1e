"""/v1/responses over the double, asked by OpenAI's own client."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai.types.responses import Response

from .conftest import Serve, Served
from .double import Double
from .test_tools import CALL, TEMPLATE, saying

WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}


def client(served: Served) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{served.http.base_url}/v1", api_key="none", max_retries=0)


async def test_a_response_in_one_object(serve: Serve) -> None:
    async with serve(double := Double()) as served:
        response = await client(served).responses.create(
            model="double", input="Hello", instructions="Be brief.", max_output_tokens=7, metadata={"a": "b"}
        )
    assert (response.status, response.output_text) == ("completed", "w0 w1 w2 ")
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.input_tokens_details.cached_tokens) == (5, 2)
    assert (response.metadata, response.instructions) == ({"a": "b"}, "Be brief.")
    assert "system\nBe brief." in str(double.seen[0].prompt)
    assert double.seen[0].max_tokens == 7


async def test_a_stream_with_reasoning_text_and_a_call(serve: Serve) -> None:
    double = saying("Hm.", "</think>\n\nWait.\n", *CALL, template=TEMPLATE)
    async with (
        serve(double) as served,
        client(served).responses.stream(
            model="double",
            input="Hello",
            tools=[WEATHER],
            extra_body={"chat_template_kwargs": {"enable_thinking": True}},
        ) as stream,
    ):
        events = [event async for event in stream]
        response = await stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [events[0].type, events[-1].type] == ["response.created", "response.completed"]
    kinds = {event.type for event in events}
    assert {"response.reasoning_text.delta", "response.output_text.delta", "response.content_part.done"} <= kinds
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
    assert response.output_text == "Wait."
    assert reasoning_tokens(response) == 1
    call: Any = response.output[2]
    assert (call.name, call.arguments, call.status) == ("weather", '{"city": "Bern"}', "completed")
    arguments = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(arguments) == '{"city": "Bern"}'


def reasoning_tokens(response: Response) -> int:
    assert response.usage
    return response.usage.output_tokens_details.reasoning_tokens


async def test_a_whole_response_counts_its_reasoning_too(serve: Serve) -> None:
    double = saying("Hm. ", "Hm.", "</think>", "Wait.", template=TEMPLATE)
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    async with serve(double) as served:
        response = await client(served).responses.create(model="double", input="Hello", extra_body=thinking)
    assert response.output_text == "Wait."
    assert reasoning_tokens(response) == 3  # with its end mark


async def test_items_of_an_earlier_response_are_turns(serve: Serve) -> None:
    async with serve(double := saying(CALL, template=TEMPLATE)) as served:
        first = await client(served).responses.create(model="double", input="Hello", tools=[WEATHER])
        call: Any = first.output[0]
        said: Any = [item.model_dump() for item in first.output]
        await client(served).responses.create(
            model="double",
            tools=[WEATHER],
            tool_choice="required",
            input=[
                {"role": "user", "content": "Hello"},
                *said,
                {"type": "function_call_output", "call_id": call.call_id, "output": "Rain"},
            ],
        )
    assert str(double.seen[1].prompt).endswith("|user:Hello|assistant:[weather Bern]|tool:Rain|")
    assert double.seen[1].sampling.grammar


async def test_items_and_tools_that_codex_sends(serve: Serve) -> None:
    items: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": None, "encrypted_content": "x"},
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search", "query": "x"}},
        {"type": "item_reference", "id": "msg_1"},
        {"type": "custom_tool_call", "call_id": "c1", "name": "apply_patch", "input": "*** Begin"},
        {"type": "custom_tool_call_output", "call_id": "c1", "output": "Done"},
        {"type": "local_shell_call", "call_id": "c2", "action": {"type": "exec", "command": ["ls"]}},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "And now?"},
    ]
    tools = [
        WEATHER,
        {"type": "web_search", "external_web_access": True},
        {"type": "custom", "name": "apply_patch", "format": {"type": "grammar"}},
        {"type": "namespace", "name": "mcp", "tools": []},
        {"type": "local_shell"},
    ]
    fields = {"client_metadata": {"a": "b"}, "prompt_cache_key": "k", "include": ["reasoning.encrypted_content"]}
    async with serve(double := saying("ok", template=TEMPLATE)) as served:
        body = {"model": "double", "input": items, "tools": tools, "truncation": "auto", "conversation": None, **fields}
        reply = await served.http.post("/v1/responses", json=body)
    assert reply.status_code == 200, reply.text
    assert [tool["name"] for tool in reply.json()["tools"]] == ["weather"]
    turns = "|user:Hello|assistant:[apply_patch *** Begin]|tool:Done|assistant:|user:And now?|"
    assert str(double.seen[0].prompt).endswith(turns)


async def test_what_the_limit_cut_off_is_incomplete(serve: Serve) -> None:
    async with serve(Double(tokens=3)) as served:
        whole = await client(served).responses.create(model="double", input="Hello", max_output_tokens=3)
        async with client(served).responses.stream(model="double", input="Hello", max_output_tokens=3) as stream:
            events = [event async for event in stream]
    done: Any = [event for event in events if event.type == "response.output_item.done"]
    last: Any = events[-1]
    items: Any = [whole.output[-1], last.response.output[-1], done[-1].item]
    assert [item.status for item in items] == ["incomplete"] * 3
    assert (whole.status, last.type) == ("incomplete", "response.incomplete")


async def test_a_schema_for_the_answer(serve: Serve) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "n", "schema": {"type": "integer"}, "strict": True}}
    async with serve(double := Double(tokens=1)) as served:
        response = await client(served).responses.create(model="double", input="Hello", text=form)
    assert double.seen[0].sampling.grammar
    assert response.text is not None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "needs tools"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]},
            "is not fetched",
        ),
        ({"tool_choice": "required"}, "needs tools"),
        ({"background": True}, "background"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}, {"type": "of_tomorrow"}]}, "nothing to answer"),
    ],
)
async def test_what_cannot_be_honoured_is_refused(serve: Serve, fields: dict[str, Any], message: str) -> None:
    async with serve(Double()) as served:
        with pytest.raises(openai.BadRequestError, match=message):
            await client(served).responses.create(**{"model": "double", "input": "Hello", **fields})
