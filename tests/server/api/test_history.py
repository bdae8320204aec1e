"""Whatever the server answered, in the form that clients keep it in, is accepted back as history, on every API."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anthropic
import httpx
import msgspec
import openai
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import BaseMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from llamaherd_server.app import create_app
from llamaherd_server.config.settings import Settings
from llamaherd_server.engine.base import Event
from llamaherd_server.wire.protocol import Delta, Generate, Started
from tests.sse import events_of

from .double import MODEL, Double, finished
from .test_tools import TEMPLATE

# A template that wants arguments as a mapping, and one that wants ids of nine characters.
MAPPING = (
    "{% for message in messages %}{{ message.role }}:{{ message.content }}{% for call in message.tool_calls %}"
    "<tool_call>\n<function={{ call.function.name }}>{% for key, value in call.function.arguments.items() %}"
    "<parameter={{ key }}>{{ value }}</parameter>{% endfor %}</function></tool_call>{% endfor %}|{% endfor %}"
)
SHORT_IDS = (
    "{% for message in messages %}{{ message.role }}:{{ message.content }}{% for call in message.tool_calls %}"
    "{% if call.id|length != 9 %}{{ raise_exception('the id of a call must have 9 characters') }}{% endif %}"
    "[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments|tojson }}{% endfor %}|{% endfor %}"
)
TEMPLATES = {"none": None, "hermes": TEMPLATE, "mapping": MAPPING, "short ids": SHORT_IDS}
ASK = "The weather?"
PARAMETERS: Any = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
arguments = st.one_of(
    st.dictionaries(st.text(), values, max_size=3).map(json.dumps),
    st.dictionaries(st.text(), values, min_size=1, max_size=3).map(lambda value: json.dumps(value)[:-2]),
    values.map(json.dumps),
    st.sampled_from(
        [
            *("", "{", "[]", "null", '"text"', "[" * 2000, '{"a": ' * 2000, '{"a": %s}' % ("[" * 900 + "]" * 900)),
            *('{"a": "\\ud83d"}', '{"\\udc00": 1}', '{"a": 1e999}', '{"a": NaN}', '{"a": %s}' % ("9" * 5000)),
            *('{"a": 1, "a": 2}', '{"a": "\\u0000"}', '{"city": "Bern"}'),
        ]
    ),
)
names = st.sampled_from(["weather", "no such tool", "a/b:c", "é", "x" * 200]) | st.text(min_size=1, max_size=9)


def _call(name: str, given: str) -> st.SearchStrategy[str]:
    spelt = json.dumps(name)
    return st.sampled_from(
        [
            f'<tool_call>\n{{"name": {spelt}, "arguments": {given}}}\n</tool_call>',
            f'<tool_call>\n{{"arguments": {given}, "name": {spelt}}}',
            f"<tool_call>\n<function={name}>\n<parameter=city>\n{given}\n</parameter>\n</function>\n</tool_call>",
            f"[TOOL_CALLS]{name}[ARGS]{given}",
        ]
    )


calls = st.tuples(names, arguments).flatmap(lambda call: _call(*call))
replies = st.lists(
    calls | st.text(max_size=9).filter(lambda text: text.isprintable()) | st.sampled_from(["</think>", "<think>", ""]),
    max_size=4,
)


@dataclass
class Served:
    """The app of one template, whose model says `says` next."""

    url: str
    says: list[str] = field(default_factory=list)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """The answer's body; fails the test unless it is a 200."""
        reply = httpx.post(f"{self.url}{path}", json=body, timeout=30)
        assert reply.status_code == 200, (reply.text, body)
        answer: dict[str, Any] = reply.json()
        return answer

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def anthropic(self) -> anthropic.Anthropic:
        return anthropic.Anthropic(base_url=self.url, api_key="none", max_retries=0)


@pytest.fixture(scope="module", params=TEMPLATES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    path: Path = tmp_path_factory.mktemp("history") / "model.gguf"
    path.write_bytes(b"GGUF")
    state = Served("")

    async def script(request: Generate) -> AsyncGenerator[Event, None]:
        yield Started(request.id, 5, 0)
        for text in state.says:
            yield Delta(id=request.id, text=text, n_tokens=1)
        yield finished(request, len(state.says))

    model = msgspec.structs.replace(MODEL, chat_template=TEMPLATES[request.param])
    config = Settings.model_validate({"model": {"name": "double", "path": path}})
    app = create_app(config, lambda _: Double(script=script, model=model))
    listener = socket.create_server(("127.0.0.1", 0))
    state.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    yield state
    server.should_exit = True
    thread.join()


def _chat_deltas(served: Served) -> dict[str, Any]:
    """A streamed message as clients without an SDK put it together: deltas merged, whatever fields they have."""
    message: dict[str, Any] = {}
    body = {"messages": [{"role": "user", "content": ASK}], "tools": [TOOL], "stream": True}
    for chunk in events_of(httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=30).text):
        delta = chunk["choices"][0]["delta"]
        made = message.setdefault("tool_calls", []) if "tool_calls" in delta else []
        for call in delta.pop("tool_calls", []):
            if call["index"] == len(made):
                made.append(call)
            else:
                made[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        for name, text in delta.items():
            message[name] = text if name == "role" else message.get(name, "") + (text or "")
    return message


@given(says=replies)
@settings(max_examples=12, deadline=None)
def test_chats_are_accepted_back(served: Served, says: list[str]) -> None:
    served.says = says
    client = served.openai()
    ask: Any = {"model": "double", "messages": [{"role": "user", "content": ASK}], "tools": [TOOL]}
    whole = client.chat.completions.create(**ask).choices[0].message
    with client.chat.completions.stream(**ask) as stream:
        streamed = stream.get_final_completion().choices[0].message
    for message in (
        whole.model_dump(),
        whole.to_dict(),
        json.loads(whole.model_dump_json()),
        streamed.model_dump(),
        _chat_deltas(served),
    ):
        results = [
            {"role": "tool", "tool_call_id": call["id"], "name": None, "content": "no such tool"}
            for call in message.get("tool_calls") or ()
        ]
        for rest in ([*results, {"role": "user", "content": "And now?"}], results):
            served.post(
                "/v1/chat/completions", messages=[{"role": "user", "content": ASK}, message, *rest], tools=[TOOL]
            )


@given(says=replies)
@settings(max_examples=12, deadline=None)
def test_responses_are_accepted_back(served: Served, says: list[str]) -> None:
    served.says = says
    client = served.openai()
    tool: Any = {"type": "function", "name": "weather", "parameters": PARAMETERS}
    ask: Any = {"model": "double", "input": ASK, "tools": [tool]}
    whole = client.responses.create(**ask)
    with client.responses.stream(**ask) as stream:
        streamed = stream.get_final_response()
    for response in (whole, streamed):
        for items in (
            [item.model_dump() for item in response.output],
            [item.to_dict() for item in response.output],
        ):
            results = [
                {"type": "function_call_output", "call_id": item["call_id"], "output": "no such tool", "id": None}
                for item in items
                if item["type"] == "function_call"
            ]
            turns = [{"role": "user", "content": ASK}, *items, *results, {"role": "user", "content": "And now?"}]
            served.post("/v1/responses", input=turns, tools=[tool])


@given(says=replies)
@settings(max_examples=12, deadline=None)
def test_messages_are_accepted_back(served: Served, says: list[str]) -> None:
    served.says = says
    client = served.anthropic()
    user = {"role": "user", "content": ASK}
    tool: Any = {"name": "weather", "input_schema": PARAMETERS}
    ask: Any = {"model": "double", "max_tokens": 99, "messages": [user], "tools": [tool]}
    whole = client.messages.create(**ask)
    with client.messages.stream(**ask) as stream:
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        for content in (
            [block.model_dump() for block in message.content],
            [block.to_dict() for block in message.content],
        ):
            results: list[dict[str, Any]] = [
                {"type": "tool_result", "tool_use_id": block["id"], "content": "no such tool", "is_error": None}
                for block in content
                if block["type"] == "tool_use"
            ]
            rest = {"role": "user", "content": [*results, {"type": "text", "text": "And now?", "citations": None}]}
            turns = [user, {"role": "assistant", "content": content}, rest]
            served.post("/v1/messages", model="double", max_tokens=9, messages=turns, tools=[tool])
            served.post("/v1/messages/count_tokens", model="double", messages=turns, tools=[tool])


@pytest.mark.parametrize("responses_api", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_langchains_messages_are_accepted_back(served: Served, responses_api: bool, stream: bool) -> None:
    chat = ChatOpenAI(
        base_url=f"{served.url}/v1",
        api_key=SecretStr("none"),
        model="double",
        max_retries=0,
        use_responses_api=responses_api,
        streaming=stream,
    ).bind_tools([TOOL])
    for given_arguments in ('{"city": "Bern"}', '{"city": "Be', "[" * 2000):
        served.says = ["Wait.", f'<tool_call>\n{{"name": "weather", "arguments": {given_arguments}}}\n</tool_call>']
        turns: list[BaseMessage] = [HumanMessage(ASK)]
        answer: Any = chat.invoke(turns)
        calls = [*answer.tool_calls, *answer.invalid_tool_calls]
        turns += [answer, *(ToolMessage("no such tool", tool_call_id=call["id"]) for call in calls)]
        served.says = ["ok"]
        assert chat.invoke([*turns, HumanMessage("And now?")])
