"""anthropic's own client."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest

from ..conftest import Server
from .conftest import TOOL

TOOLS: Any = [{"name": TOOL["name"], "description": TOOL["description"], "input_schema": TOOL["parameters"]}]
ASK: Any = [{"role": "user", "content": "What is the weather in Rome?"}]


@pytest.fixture
def client(served: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0)


def test_messages(client: anthropic.Anthropic) -> None:
    answer = client.messages.create(model="smollm2", max_tokens=8, messages=ASK, system="Be brief.")
    assert answer.content[0].type == "text" and answer.content[0].text
    assert 0 < answer.usage.output_tokens <= 8


def test_a_stream_tells_the_same_as_the_whole(client: anthropic.Anthropic) -> None:
    fields: Any = {"model": "smollm2", "max_tokens": 8, "messages": ASK, "extra_body": {"temperature": 0}}
    whole = client.messages.create(**fields)
    with client.messages.stream(**fields) as stream:
        streamed = stream.get_final_message()
    assert [one.to_dict()["text"] for one in streamed.content] == [one.to_dict()["text"] for one in whole.content]
    assert streamed.stop_reason == whole.stop_reason


def test_a_required_call_follows_its_schema(client: anthropic.Anthropic) -> None:
    fields: Any = {"model": "smollm2", "max_tokens": 128, "messages": ASK, "tools": TOOLS}
    fields["tool_choice"] = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}
    with client.messages.stream(**fields) as stream:
        streamed = stream.get_final_message()
    for answer in (client.messages.create(**fields), streamed):
        assert answer.stop_reason == "tool_use"
        [call] = [block.to_dict() for block in answer.content]
        assert call["input"] in ({"city": "Rome"}, {"city": "Oslo"})


def test_a_tools_result_is_taken(client: anthropic.Anthropic) -> None:
    call = {"type": "tool_use", "id": "c1", "name": "get_weather", "input": {"city": "Rome"}}
    result = {"type": "tool_result", "tool_use_id": "c1", "content": "sunny"}
    said: Any = [{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    answer = client.messages.create(model="smollm2", max_tokens=8, messages=[*ASK, *said], tools=TOOLS)
    taken = answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)
    assert taken > client.messages.count_tokens(model="smollm2", messages=ASK).input_tokens


def test_what_claude_code_sends_is_taken(client: anthropic.Anthropic) -> None:
    reminder: Any = {"role": "system", "content": "Be brief."}
    kept = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    fields: Any = {"model": "smollm2", "messages": [*ASK, reminder], "extra_body": {"context_management": kept}}
    answer = client.messages.create(max_tokens=8, **fields)
    taken = answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)
    assert taken == client.messages.count_tokens(**fields).input_tokens
    assert taken > client.messages.count_tokens(model="smollm2", messages=ASK).input_tokens


def test_errors_raise_what_the_sdk_has_for_them(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="smollm2"):
        client.messages.create(model="missing", max_tokens=8, messages=ASK)
