"""The format of a template of no known family: found by rendering it, read, and held to by grammar."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llamaherd_server.chat.adapt import Prompting, prompt_of, traits_of
from llamaherd_server.toolcalls.derived import form_of
from llamaherd_server.toolcalls.formats import LFM2
from llamaherd_server.toolcalls.reader import Reader
from llamaherd_server.toolcalls.tools import Choice, Reply, grammar_of_reply
from tests.server.api.conftest import Serve
from tests.server.api.test_tool_formats import ASKED, CLOCK, WEATHER, Lets, every_way
from tests.server.api.test_tools import saying

# As much of a template as all have; `calls` prints an assistant's.
AROUND = """{%% for t in tools or [] %%}<|tool|>{{ t | tojson }}{%% endfor %%}
{%% for m in messages %%}<|turn|>{{ m.role }}
{%% if m.tool_calls %%}{{ m.content }}%s{%% else %%}{{ m.content }}{%% endif %%}<|over|>
{%% endfor %%}{%% if add_generation_prompt %%}<|turn|>assistant
{%% endif %%}"""
EACH = "{%% for c in m.tool_calls %%}{%% set f = c.function %%}%s{%% endfor %%}"
OBJECT = '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}'
VALUE = "{{ v if v is string else v | tojson }}"
CALLS = {
    "objects in blocks": EACH % f"<call>{OBJECT}</call>\n",
    "objects in a block, line by line": "<calls>\n" + EACH % f"{OBJECT}\n" + "</calls>",
    "a list of objects": "<|calls|>[" + EACH % (OBJECT + "{{ '' if loop.last else ', ' }}") + "]<|end_calls|>",
    "objects with an id": EACH
    % '<call>{"id": "{{ c.id }}", "name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}</call>',
    "a call only": '{% set f = m.tool_calls[0].function %}<|call|>{"name": "{{ f.name }}", "arguments": '
    "{{ f.arguments | tojson }}}",
    "names before objects": EACH % "<fn={{ f.name }}>{{ f.arguments | tojson }}</fn>",
    "names as keys": "[CALLS]["
    + EACH % '{"{{ f.name }}": {{ f.arguments | tojson }}}{{ "" if loop.last else ", " }}'
    + "]",
    "names and ids between marks": "<|calls|>"
    + EACH % "<|call|>{{ c.id }}<|name|>{{ f.name }}<|args|>{{ f.arguments | tojson }}<|end_call|>"
    + "<|end_calls|>",
    "elements": EACH
    % (
        '<fn name="{{ f.name }}">{% for k, v in f.arguments.items() %}<arg name="{{ k }}">'
        + VALUE
        + "</arg>{% endfor %}</fn>\n"
    ),
    "elements in blocks, on lines of their own": EACH
    % (
        "\n<x:call>\n<fn={{ f.name }}>\n{% for k, v in f.arguments.items() %}<arg={{ k }}>\n"
        + VALUE
        + "\n</arg>\n{% endfor %}</fn>\n</x:call>"
    ),
    "keys and values in a block": "<calls:x>\n"
    + EACH
    % (
        "<call:x>{{ f.name }}<sep:x>\n{% for k, v in f.arguments.items() %}<key:x>{{ k }}</key:x>\n<value:x>"
        + VALUE
        + "</value:x>\n{% endfor %}</call:x>\n"
    )
    + "</calls:x>",
}
# Nothing tells such calls from a text, or what stands around them differs from call to call.
NO_FORMAT = [
    EACH % "{{ f.name }}\n{{ f.arguments | tojson }}",
    EACH % "<{{ f.name }}>{{ f.arguments | tojson }}</{{ f.name }}>",
    EACH % "<call>{{ f.arguments | tojson }} {{ f.name }}</call>",
]


def printed(template: str, *calls: tuple[str, dict[str, Any]]) -> str:
    """An assistant's turn with these calls."""
    made = [
        {"id": f"call0000{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for number, (name, arguments) in enumerate(calls)
    ]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "U-one"},
        {"role": "assistant", "content": "", "tool_calls": made},
    ]
    tools = [WEATHER.for_template(), CLOCK.for_template()]
    prompt = prompt_of(Prompting(template, messages, tools, traits_of(template).traits, {}))
    return prompt.rpartition("U-one<|over|>\n<|turn|>assistant\n")[2].partition("<|over|>")[0]


@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
def test_calls_are_read_and_enforced_as_they_are_printed(calls: str, lets: Lets) -> None:
    template = AROUND % (calls)
    shape = traits_of(template).shape
    assert shape is not None
    one, two = printed(template, ("get_weather", ASKED)), printed(template, ("get_weather", ASKED), ("clock", {}))
    schemas = {tool.name: tool.schema for tool in (WEATHER, CLOCK)}
    reader = Reader(form_of(shape), None, False, schemas)
    assert every_way(reader, f"Let me look.\n{one}") == ("Let me look.", "", [("get_weather", ASKED)])
    if shape.between is not None:
        assert every_way(reader, two)[2] == [("get_weather", ASKED), ("clock", {})]
    assert every_way(reader, "No, 1 < 2 [and so on].")[0] == "No, 1 < 2 [and so on]."

    grammar = grammar_of_reply(Reply(shape, None, False, Choice((WEATHER, CLOCK), must=True), None))
    assert grammar
    assert lets(grammar, one)
    assert not lets(grammar, "No.")
    assert not lets(grammar, one.replace("city", "town"))
    if shape.between is not None:
        assert lets(grammar, two)


@pytest.mark.parametrize("calls", NO_FORMAT)
def test_what_cannot_be_read_back_has_no_format(calls: str) -> None:
    assert traits_of(AROUND % (calls)).shape is None


def test_a_known_family_stays_what_it_is() -> None:
    template = AROUND % (EACH % f"<tool_call>\n{OBJECT}\n</tool_call>")
    assert traits_of(template).shape is None
    assert json.loads(printed(template, ("clock", {})).split("\n")[1]) == {"name": "clock", "arguments": {}}


async def test_a_request_is_served_in_the_templates_own_format(serve: Serve, lets: Lets) -> None:
    template = AROUND % (CALLS["names before objects"])
    call = '<fn=get_weather>{"city": "Bern"}</fn>'
    tool = WEATHER.for_template()
    async with serve(double := saying("Wait. ", *call, template=template)) as served:
        [choice] = (await served.chat(tools=[tool])).json()["choices"]
        await served.chat(tools=[tool], tool_choice="required")
    assert choice["message"]["content"] == "Wait."
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Bern"}'}
    free, forced = double.seen
    assert "<|tool|>" in str(free.prompt)
    assert "# Tools" not in str(free.prompt)
    assert forced.sampling.grammar
    assert lets(forced.sampling.grammar, call)
    assert "</fn>" in forced.preserved


def test_lfm2s_texts_may_have_anything_in_quotes() -> None:
    text = "<|tool_call_start|>[get_weather(city='it's \"West\"\n\\d, too', days=2), clock()]<|tool_call_end|>"
    reader = Reader(LFM2, None, False, {tool.name: tool.schema for tool in (WEATHER, CLOCK)})
    assert every_way(reader, text)[2] == [("get_weather", {"city": 'it\'s "West"\n\\d, too', "days": 2}), ("clock", {})]
