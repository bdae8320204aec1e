"""Tools over the double: what the template is given, what the engine is asked for, what the client is told."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec
import pytest

from llamaherd_server.engine.base import Event
from llamaherd_server.wire.protocol import Delta, Generate, Started
from tests.sse import events_of

from .conftest import Serve
from .double import MODEL, Double, finished

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather now",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
# As Qwen writes it, in small.
TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool.function.name }} <tool_call> arguments{% endfor %}|{% endif %}"
    "{% for message in messages %}{{ message.role }}:{{ message.content }}"
    "{% for call in message.tool_calls %}[{{ call.function.name }} {{ call.function.arguments.values() | join }}]"
    "{% endfor %}|{% endfor %}"
    "{% if enable_thinking %}<think>\n{% endif %}{# </think> #}"
)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
TURNS = [
    {"role": "user", "content": "Well?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "Rain"},
]


def saying(*texts: str, template: str | None = None) -> Double:
    """A double that says these texts."""

    async def script(request: Generate) -> AsyncGenerator[Event, None]:
        yield Started(request.id, 5, 0)
        for text in texts:
            yield Delta(id=request.id, text=text, n_tokens=1)
        yield finished(request, len(texts))

    return Double(script=script, model=msgspec.structs.replace(MODEL, chat_template=template))


async def test_a_call_in_one_object(serve: Serve) -> None:
    async with serve(saying("Wait.\n\n", CALL, template=TEMPLATE)) as served:
        [choice] = (await served.chat(tools=[WEATHER])).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Wait."
    [call] = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Bern"}'}


async def test_a_call_as_it_is_written(serve: Serve) -> None:
    async with serve(saying(*CALL, template=TEMPLATE)) as served:
        chunks = events_of((await served.chat(tools=[WEATHER], stream=True)).text)
    calls = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert calls[0]["function"] == {"name": "weather", "arguments": ""}
    assert {call["index"] for call in calls} == {0}
    assert len(calls) > 5
    assert "".join(call["function"]["arguments"] for call in calls) == '{"city": "Bern"}'
    assert not any(chunk["choices"][0]["delta"].get("content") for chunk in chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
async def test_a_call_that_must_come_is_a_grammar(serve: Serve, choice: Any, lets: Callable[[str, str], bool]) -> None:
    async with serve(double := saying(CALL, template=TEMPLATE)) as served:
        await served.chat(tools=[WEATHER], tool_choice=choice)
        await served.chat(tools=[WEATHER])
        await served.chat(tools=[WEATHER], tool_choice="none")
    forced, free, none = double.seen
    assert forced.sampling.grammar
    assert lets(forced.sampling.grammar, CALL)
    assert free.sampling.grammar is None
    assert "<tool_call>" in forced.preserved
    assert "weather" in str(free.prompt)
    assert "weather" not in str(none.prompt)


async def test_templates_get_arguments_as_objects(serve: Serve) -> None:
    async with serve(double := saying("ok", template=TEMPLATE)) as served:
        await served.chat(messages=TURNS, tools=[WEATHER])
        rendered = await served.http.post("/apply-template", json={"messages": TURNS, "tools": [WEATHER]})
    assert rendered.json() == {"prompt": double.seen[0].prompt}
    assert double.seen[0].prompt == ("weather <tool_call> arguments|user:Well?|assistant:[weather Bern]|tool:Rain|")


async def test_a_template_without_tools_is_told_of_them_in_the_system_message(serve: Serve) -> None:
    async with serve(double := saying(CALL)) as served:
        [choice] = (await served.chat(messages=TURNS, tools=[WEATHER])).json()["choices"]
    prompt = str(double.seen[0].prompt)
    assert prompt.startswith("<|im_start|>system\n# Tools")
    assert json.dumps(WEATHER["function"]["description"]) in prompt  # type: ignore[index]
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>' in prompt
    assert "<|im_start|>user\n<tool_response>\nRain\n</tool_response>" in prompt
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "weather"


async def test_reasoning_is_apart(serve: Serve) -> None:
    double = saying("Hm", "m.", "</think>", "\n\nYes", ".", template=TEMPLATE)
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    async with serve(double) as served:
        message = (await served.chat(**thinking)).json()["choices"][0]["message"]
        chunks = events_of((await served.chat(stream=True, **thinking)).text)
        left = (await served.chat(reasoning_format="none", **thinking)).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hmm.", "Yes.")
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hmm."
    assert "".join(delta.get("content", "") for delta in deltas) == "Yes."
    assert left["content"] == "Hmm.</think>\n\nYes."


async def test_a_schema_for_the_answer_stands_beside_tools(serve: Serve, lets: Callable[[str, str], bool]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}
    async with serve(double := saying("7", template=TEMPLATE)) as served:
        await served.chat(tools=[WEATHER], response_format=form)
    grammar = double.seen[0].sampling.grammar
    assert grammar
    assert [lets(grammar, text) for text in ("7", CALL, "seven")] == [True, True, False]
