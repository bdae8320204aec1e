"""openai's own client."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from ..conftest import Server
from .conftest import TOOL

TOOLS: Any = [{"type": "function", "function": TOOL}]
ASK: Any = [{"role": "user", "content": "What is the weather in Rome?"}]


def _called(answer: Any) -> Any:
    """The arguments of a chat completion's only call."""
    [call] = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    return json.loads(call.function.arguments)


@pytest.fixture
def client(served: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="smollm2", messages=ASK, max_tokens=8)
    assert answer.choices[0].message.content
    assert answer.usage and answer.usage.completion_tokens <= 8


def test_a_stream_tells_the_same_as_the_whole(client: openai.OpenAI) -> None:
    fields: Any = {"model": "smollm2", "messages": ASK, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**fields).choices[0].message.content
    chunks = client.chat.completions.create(**fields, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="smollm2", prompt=["One, two,", "A, B,"], max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_required_call_follows_its_schema(client: openai.OpenAI, choice: Any) -> None:
    answer = client.chat.completions.create(
        model="smollm2", messages=ASK, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    assert _called(answer)["city"] in ("Rome", "Oslo")


def test_a_streamed_call(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="smollm2", messages=ASK, tools=TOOLS, tool_choice="required", parallel_tool_calls=False
    ) as stream:
        answer = stream.get_final_completion()
    assert _called(answer)["city"] in ("Rome", "Oslo")


def test_a_tools_result_is_taken(client: openai.OpenAI) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    said: Any = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c1", "content": "sun"}]
    answer = client.chat.completions.create(
        model="smollm2", messages=[*ASK, *said], tools=TOOLS, tool_choice="none", max_tokens=8
    )
    assert answer.choices[0].message.content


class Weather(BaseModel):
    city: Literal["Rome", "Oslo"]
    sunny: bool


def test_structured_parse(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model="smollm2", messages=ASK, response_format=Weather)
    assert isinstance(answer.choices[0].message.parsed, Weather)


def test_embeddings(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="smollm2", input=["one", "two"], dimensions=16)
    assert [len(one.embedding) for one in answer.data] == [16, 16]


def test_responses(client: openai.OpenAI) -> None:
    fields: Any = {"model": "smollm2", "input": "Hello", "max_output_tokens": 16, "temperature": 0}
    whole = client.responses.create(**fields, store=False)
    events: Any = client.responses.create(**fields, store=False, stream=True)
    streamed = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert whole.output_text
    assert streamed == whole.output_text


def test_responses_call_a_tool_and_parse(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "strict": True, **TOOL}
    answer = client.responses.create(
        model="smollm2",
        input="The weather in Rome?",
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        store=False,
    )
    [call] = [item for item in answer.output if item.type == "function_call"]
    assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")
    parsed = client.responses.parse(model="smollm2", input="The weather?", text_format=Weather, store=False)
    assert isinstance(parsed.output_parsed, Weather)


def test_errors_raise_what_the_sdk_has_for_them(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="smollm2"):
        client.chat.completions.create(model="gpt-4", messages=ASK)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="smollm2", messages=ASK, tool_choice="required")
    assert refused.value.param == "tool_choice"


def test_what_it_answered_is_history(client: openai.OpenAI) -> None:
    fields: Any = {"model": "smollm2", "max_tokens": 24, "tools": TOOLS}
    called: Any = client.chat.completions.create(**fields, messages=ASK, tool_choice="required").choices[0].message
    results: Any = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in called.tool_calls]
    turns: Any = [*ASK, called.model_dump(), *results]
    assert client.chat.completions.create(**fields, messages=turns, tool_choice="none").choices[0].message.content
    said: Any = client.chat.completions.create(**fields, messages=ASK, tool_choice="none").choices[0].message.to_dict()
    more: Any = [*ASK, said, {"role": "user", "content": "And in Oslo?"}]
    assert client.chat.completions.create(**fields, messages=more, tool_choice="none").choices[0].message.content


def test_what_it_responded_is_history(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", **TOOL}
    fields: Any = {"model": "smollm2", "max_output_tokens": 24, "tools": [tool]}
    called: Any = client.responses.create(**fields, input=ASK, tool_choice="required").output
    results: Any = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"}
        for item in called
        if item.type == "function_call"
    ]
    turns: Any = [*ASK, *(item.model_dump() for item in called), *results]
    assert results
    assert client.responses.create(**fields, input=turns, tool_choice="none").output_text
