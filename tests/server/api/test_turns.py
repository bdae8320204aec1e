"""Turns of channels, sections and prompts that begin a marker: found by rendering, read, and held to by grammar."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from llamaherd_server.chat.adapt import Prompting, TemplateProfile, prompt_of, traits_of
from llamaherd_server.toolcalls.derived import form_of
from llamaherd_server.toolcalls.reader import Reader
from llamaherd_server.toolcalls.tools import Choice, Reply, Tool, grammar_of_reply
from tests.server.api.conftest import Serve
from tests.server.api.test_tool_formats import CLOCK, Lets, every_way
from tests.server.api.test_tools import saying

TYPES = {"text": "string", "count": "integer", "share": "number", "sure": "boolean", "list": "array", "map": "object"}
FIND = Tool(
    "find",
    "Finds",
    {"type": "object", "properties": {key: {"type": kind} for key, kind in TYPES.items()}, "required": ["text"]},
    strict=False,
)
ARGUMENTS: list[dict[str, Any]] = [
    {"text": "x", "count": -7, "share": 1.5, "sure": True, "list": [1, "y", [False]], "map": {"a": {"b": "c"}}},
    {"text": 'Zürich "West"\n\\ \'q\' 😀 {"a": [1]} & <b>', "count": 0},
    {"text": "</think> <think> >>>all <|close|>tool <|over|> </cal ]]>"},
    {"text": "7"},
    {"text": "  y "},
    {"text": ""},
]
TOOLS = "{% for t in tools or [] %}<|tool|>{{ t | tojson }}{% endfor %}"
VALUE = "{{ v if v is string else v | tojson }}"
# Each message has a recipient; a call's is its tool.
CHANNELS = (
    TOOLS + "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.reasoning_content %}"
    "<|start|>assistant to=self<|body|>{{ m.reasoning_content }}<|next|>{% endif %}"
    "{% for c in m.tool_calls or [] %}<|start|>assistant to={{ c.function.name }}<|body|><calls>\n"
    '<fn name="{{ c.function.name }}">\n{% for k, v in c.function.arguments.items() %}<arg name="{{ k }}">'
    + VALUE
    + "</arg>\n{% endfor %}</fn>\n</calls>{{ '<|over|>' if loop.last else '<|next|>' }}"
    "{% else %}<|start|>assistant to=user<|body|>{{ m.content }}<|over|>{% endfor %}"
    "{% else %}<|start|>{{ m.role }}<|body|>{{ m.content }}<|over|>{% endif %}{% endfor %}<|start|>assistant"
)
# Sections of marks with words between them, numbered calls, and parameters that name their type.
SECTIONS = (
    "{% macro on(tag) %}<|open|>{{ tag }}<|sep|>{% endmacro %}"
    "{% macro off(tag) %}<|close|>{{ tag }}<|sep|>{% endmacro %}"
    + TOOLS
    + "{% for m in messages %}{{ on('message role=\"' ~ m.role ~ '\"') }}{% if m.role == 'assistant' %}"
    "{{ on('think') }}{{ m.reasoning_content }}{{ off('think') }}{{ on('text') }}{{ m.content }}{{ off('text') }}"
    "{% if m.tool_calls %}{{ on('tools') }}{% for c in m.tool_calls %}"
    "{{ on('call tool=\"' ~ c.function.name ~ '\" index=\"' ~ loop.index ~ '\"') }}"
    "{% for k, v in c.function.arguments.items() %}"
    "{% set kind = 'boolean' if v is boolean else 'null' if v is none else 'number' if v is number else "
    "'string' if v is string else 'object' if v is mapping else 'array' %}"
    "{{ on('arg key=\"' ~ k ~ '\" type=\"' ~ kind ~ '\"') }}" + VALUE + "{{ off('arg') }}{% endfor %}{{ off('call') }}"
    "{% endfor %}{{ off('tools') }}{% endif %}{% else %}{{ m.content }}{% endif %}{{ off('message') }}<|over|>"
    "{% endfor %}{{ on('message role=\"assistant\"') }}{{ on('think') }}"
)
# The prompt ends with what stands before each call, and before a text.
PROMPTED = (
    TOOLS + "{% for m in messages %}<|head|>{{ m.role }}<|body|>\n{% if m.role == 'assistant' %}"
    "{% if m.content %}>>>all\n{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}>>>{{ c.function.name }}\n"
    "{{ c.function.arguments | tojson }}{% endfor %}{% else %}{{ m.content }}{% endif %}<|over|>{% endfor %}"
    "<|head|>assistant<|body|>\n>>>"
)
# Objects and lists are elements too, and each element bears the parameter's name.
NESTED = (
    "{% macro x(v) %}{% if v is mapping %}{% for k, w in v.items() %}{!}<{{ k }}>{{ x(w) }}{!}</{{ k }}>{% endfor %}"
    "{% elif v is string or v is not iterable %}{{ v if v is string else v | tojson }}{% else %}"
    "{% for w in v %}{!}<item>{{ x(w) }}{!}</item>{% endfor %}{% endif %}{% endmacro %}"
    + TOOLS
    + "{% for m in messages %}<|turn|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content %}<my:think>{{ m.reasoning_content }}{% endif %}</my:think>{% endif %}{{ m.content }}"
    "{% if m.tool_calls %}{!}<calls>\n{% for c in m.tool_calls %}"
    '{!}<fn name="{{ c.function.name }}">{{ x(c.function.arguments) }}{!}</fn>\n{% endfor %}{!}</calls>{% endif %}'
    "<|over|>\n{% endfor %}<|turn|>assistant{{ '\n' }}"
).replace("{!}", "]<]ours[>[")
# Texts with markup are quoted as XML has it.
QUOTED = (
    TOOLS + "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    '<fn name="{{ c.function.name }}">{% for k, v in c.function.arguments.items() %}<arg name="{{ k }}">'
    "{% if v is string %}{{ '<![CDATA[' ~ v ~ ']]>' if '<' in v or '&' in v else v }}{% else %}"
    "{{ v | tojson }}{% endif %}"
    "</arg>{% endfor %}</fn>\n{% endfor %}<|over|>\n{% endfor %}<|turn|>assistant{{ '\n' }}"
)
# No marker at all, but a word before a list.
WORD = (
    TOOLS + "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}\nAction:\n```json\n[\n"
    '{% for c in m.tool_calls %}    {\n        "tool_name": "{{ c.function.name }}",\n        "parameters": '
    "{{ c.function.arguments | tojson(indent=4) | indent(8) }}\n    }{{ '' if loop.last else ',\\n' }}{% endfor %}"
    "\n]```\n{% endif %}<|over|>\n{% endfor %}<|turn|>assistant{{ '\n' }}"
)
TEMPLATES = {
    "channels": CHANNELS,
    "sections": SECTIONS,
    "prompted": PROMPTED,
    "nested": NESTED,
    "quoted": QUOTED,
    "word": WORD,
}
USER: dict[str, Any] = {"role": "user", "content": "U-one"}


def reader_of(template: str) -> tuple[TemplateProfile, Reader]:
    found = traits_of(template)
    turn, form = found.turn, form_of(found.shape) if found.shape else None
    schemas = {tool.name: tool.schema for tool in (FIND, CLOCK)}
    begun = bool(turn.thinking and reply(template, found).endswith(turn.thinking[0]))
    return found, Reader(form, turn.thinking, begun, schemas, True, turn.skipped, turn.prompted, turn.resumed)


def reply(template: str, found: TemplateProfile, **answer: Any) -> str:
    """What a model would print of this answer; without one, the prompt."""
    tools = [FIND.for_template(), CLOCK.for_template()]
    prompt = prompt_of(Prompting(template, [USER], tools, found.traits, {}))
    if not answer:
        return prompt
    said = {"role": "assistant", "content": "", "reasoning_content": "", **answer}
    printed = prompt_of(Prompting(template, [USER, said], tools, found.traits, {}))
    return printed.removeprefix(prompt).rpartition("<|over|>")[0]


def called(*calls: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"id": f"call0000{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for number, (name, arguments) in enumerate(calls)
    ]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=["types", "text", "marks", "number", "spaces", "empty"])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_calls_are_read_and_enforced_as_they_are_printed(template: str, arguments: dict[str, Any], lets: Lets) -> None:
    found, reader = reader_of(template)
    assert found.failures == {}
    calls = [("find", arguments), ("clock", {}), ("find", {"text": "two"})]
    text = reply(template, found, tool_calls=called(*calls))
    assert every_way(reader, text) == ("", "", calls)
    choice = Choice((FIND, CLOCK), must=True)
    prompted, resumed, said = reader.around
    grammar = grammar_of_reply(
        Reply(found.shape, reader.thinking, reader.thinks, choice, None, prompted, resumed, said)
    )
    assert grammar
    assert not lets(grammar, "No.")
    if template not in (NESTED, QUOTED):  # there a grammar has JSON in elements, and no quotes
        text = text.removesuffix("<|close|>message<|sep|>")
        assert lets(grammar, text)
        assert not lets(grammar, text.replace("clock", "clocks"))
    if template == SECTIONS:  # the text may have been begun by the prompt
        assert lets(grammar, text.replace("<|open|>text<|sep|>", "", 1))


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_texts_and_reasoning_are_read_without_what_is_around_them(template: str) -> None:
    found, reader = reader_of(template)
    text = reply(template, found, content="It is 1 < 2.")
    assert every_way(reader, text) == ("It is 1 < 2.", "", [])
    without_tools = dataclasses.replace(reader, form=None)
    assert every_way(without_tools, text) == ("It is 1 < 2.", "", [])
    if template in (CHANNELS, SECTIONS, NESTED):
        text = reply(template, found, content="So.", reasoning_content="Hm, <b>.")
        assert every_way(reader, text) == ("So.", "Hm, <b>.", [])
    both = reply(template, found, content="", reasoning_content="Hm.", tool_calls=called(("find", {"text": "x"})))
    assert every_way(reader, both)[2] == [("find", {"text": "x"})]


def test_a_reply_that_does_not_go_on_as_the_prompt_begins_is_a_text() -> None:
    _, reader = reader_of(PROMPTED)
    assert every_way(reader, "Hello\n\nall, 1 >>> 2\n{") == ("Hello\n\nall, 1 >>> 2\n{", "", [])
    assert every_way(reader, "") == ("", "", [])


async def test_a_request_to_a_prompted_template_is_served(serve: Serve, lets: Lets) -> None:
    tool = FIND.for_template()
    async with serve(double := saying("all\nWait.", '>>>find\n{"text": "x"}', template=PROMPTED)) as served:
        [choice] = (await served.chat(tools=[tool])).json()["choices"]
        await served.chat(tools=[{**tool, "function": {**tool["function"], "strict": True}}])
        await served.chat(tools=[tool], tool_choice="required", parallel_tool_calls=True)
    assert choice["message"]["content"] == "Wait."
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "find", "arguments": '{"text": "x"}'}
    _, strict, forced = double.seen
    assert strict.sampling.grammar
    assert lets(strict.sampling.grammar, "all\nHello.")
    assert lets(strict.sampling.grammar, 'all\nHello.>>>find\n{"text": "x"}')
    assert forced.sampling.grammar
    assert lets(forced.sampling.grammar, 'find\n{"text": "x"}>>>find\n{"text": "y"}')
    assert not lets(forced.sampling.grammar, "all\nHello.")


async def test_reasoning_that_is_not_told_apart_keeps_its_markers(serve: Serve) -> None:
    async with serve(saying("</my:think>", "So.", template=NESTED)) as served:
        [apart] = (await served.chat()).json()["choices"]
        [raw] = (await served.chat(reasoning_format="none")).json()["choices"]
    assert apart["message"]["content"] == "So."
    assert raw["message"]["content"] == "</my:think>So."
