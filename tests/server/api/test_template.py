"""Chat templates in their sandbox: rendered as transformers does, contained when they misbehave."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from llamaherd_server.chat.adapt import Prompting, prompt_of, traits_of
from llamaherd_server.chat.conversations import SEARCH, WEATHER
from llamaherd_server.chat.template import adds_special, render
from llamaherd_server.errors import ApiError
from llamaherd_server.sandbox.pool import Sandbox
from llamaherd_server.toolcalls.derived import form_of
from llamaherd_server.toolcalls.formats import HARMONY, format_of
from llamaherd_server.toolcalls.reader import Reader

from .double import MODEL

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hé <|im_end|>"}]


@dataclass
class Renderer:
    sandbox: Sandbox

    async def __call__(self, template: str | None, **variables: Any) -> str:
        model = msgspec.structs.replace(MODEL, chat_template=template)
        return await render(self.sandbox, model, MESSAGES, variables)


@pytest.fixture
async def rendered() -> AsyncIterator[Renderer]:
    sandbox = Sandbox()
    yield Renderer(sandbox)
    await sandbox.stop()


async def test_without_a_template_it_is_chatml(rendered: Renderer) -> None:
    assert await rendered(None) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHé <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("{{ bos_token }}{{ messages[0]['role'] }}", "<s>system"),
        ("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "system"),
        ("{{ messages[1] | tojson }}", '{"role": "user", "content": "Hé <|im_end|>"}'),
        ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ date_string | length }}", "11"),
        ("{{ messages | map(attribute='role') | tojson }}", '["system", "user"]'),
        ("{{ ['é'] | tojson(ensure_ascii=true, separators=(',', ':')) }}", '["\\u00e9"]'),
        ("{{ nothing | tojson }}", "null"),
        ("{% generation %}{{ messages[0].role }}{% endgeneration %}", "system"),
        ("{% set seen = [] %}{% set _ = seen.append(1) %}{{ seen | length }}", "1"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}{{ {'b': 2} | items | list }}", "a1[('b', 2)]"),
        ("{{ enable_thinking }}", "False"),
        ("{{ thinking }} {{ thinking_mode }} {{ thinking_budget }}", "False disabled 0"),
        ("{%- if true %}\n  a\n{%- endif %}", "  a"),
    ],
)
async def test_has_what_templates_are_written_against(rendered: Renderer, template: str, prompt: str) -> None:
    assert await rendered(template, enable_thinking=False) == prompt


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 2000000000 }}",
        "{{ '%2000000000d' % 1 }}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__ }}{{ cycler.__init__.__globals__.os.system('id') }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ undefined.attribute }}",
        "{% if %}",
    ],
)
async def test_a_template_that_misbehaves_fails_alone(rendered: Renderer, template: str) -> None:
    with pytest.raises(ApiError) as refused:
        await rendered(template)
    assert (refused.value.status_code, refused.value.code) == (400, "template_error")
    assert await rendered("fine") == "fine"


async def test_a_templates_own_message_reaches_the_client(rendered: Renderer) -> None:
    with pytest.raises(ApiError, match="roles must alternate"):
        await rendered("{{ raise_exception('roles must alternate') }}")


async def test_thinking_is_on_unless_a_request_says_otherwise(rendered: Renderer) -> None:
    assert await rendered("{{ enable_thinking }}") == "True"
    assert await rendered("{{ thinking }} {{ thinking_mode }}") == " "  # each template has its own default
    assert await rendered("{{ thinking }} {{ thinking_mode }}", enable_thinking=True) == "True enabled"
    assert await rendered("{{ enable_thinking }}", enable_thinking=False) == "False"


def prompt(template: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
    """What a template prints once it was found out what it cannot do."""
    return prompt_of(Prompting(template, messages, tools or [], traits_of(template).traits, {}))


PRINTED = "{% for m in messages %}{{ m.role }}:{{ m.content }}|{% endfor %}"


@pytest.mark.parametrize(
    ("template", "printed"),
    [
        (
            f"{{% if messages[0].role == 'system' %}}{{{{ raise_exception('no') }}}}{{% endif %}}{PRINTED}",
            "user:S\n\nU|",
        ),
        ("{% for m in messages if m.role != 'system' %}{{ m.role }}:{{ m.content }}|{% endfor %}", "user:S\n\nU|"),
        (PRINTED + "{# a developer #}", "system:S|user:U|"),
        ("{% for m in messages %}{{ m.role }}:{{ m.content[0].text }}|{% endfor %}", "system:S|user:U|"),
    ],
)
def test_a_template_gets_what_it_can_print(template: str, printed: str) -> None:
    assert prompt(template, [{"role": "developer", "content": "S"}, {"role": "user", "content": "U"}]) == printed


CALL = "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
PRINTED_CALLS = "{% for m in messages %}{{ m.content }}" + CALL + "{% endfor %}"
TOLD = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
ASKED: list[dict[str, Any]] = [
    {"role": "user", "content": "U"},
    {
        "role": "assistant",
        "content": "A",
        "reasoning_content": "T",
        "tool_calls": [
            {"id": f"call0000{n}", "type": "function", "function": {"name": "get_weather", "arguments": {"place": n}}}
            for n in (1, 2)
        ],
    },
    *({"role": "tool", "tool_call_id": f"call0000{n}", "name": "get_weather", "content": f"R{n}"} for n in (1, 2)),
]


@pytest.mark.parametrize(
    ("template", "printed"),
    [
        (TOLD + "{% for m in messages %}{{ m.thinking }}{{ m.content }}" + CALL + "|{% endfor %}", "U|TA"),
        (
            TOLD + "{% for m in messages %}{% if m.tool_calls and m.thinking and m.content %}"
            "{{ raise_exception('both') }}{% endif %}{{ m.thinking }}{{ m.content }}" + CALL + "|{% endfor %}",
            "U|T\n\nA",
        ),
    ],
)
def test_reasoning_has_the_templates_name(template: str, printed: str) -> None:
    calls = '[get_weather {"place": 1}][get_weather {"place": 2}]|R1|R2|'
    assert traits_of(template).failures == {}
    assert prompt(template, ASKED, [WEATHER]) == f"get_weather{printed}{calls}"


def test_no_parallel_call_of_a_history_is_lost() -> None:
    template = (
        TOLD + "{% for m in messages %}{{ m.content }}{% for c in (m.tool_calls or [])[:1] %}"
        "[{{ c.function.arguments | tojson }}]{% endfor %}|{% endfor %}"
    )
    assert prompt(template, ASKED, [WEATHER]) == 'get_weatherU|A[{"place": 1}]|R1|[{"place": 2}]|R2|'


def test_results_are_named_and_those_of_no_call_are_the_users() -> None:
    template = (
        TOLD + "{% for m in messages %}{% if m.role == 'tool' and not m.name %}{{ raise_exception('whose?') }}"
        "{% endif %}{{ m.role }} {{ m.name }}:{{ m.content }}" + CALL + "|{% endfor %}"
    )
    call, result = {**ASKED[1], "tool_calls": ASKED[1]["tool_calls"][:1]}, {**ASKED[2]}
    del result["name"]
    assert (
        prompt(template, [ASKED[0], call, result])
        == 'user :U|assistant :A[get_weather {"place": 1}]|tool get_weather:R1|'
    )
    assert prompt(template, [ASKED[0], result]) == "user :U|user :<tool_response>\nR1\n</tool_response>|"


def test_tools_as_a_text_of_their_own() -> None:
    template = (
        "{{ 'F' + functions }} on {{ 'D' + datetime }}{% for m in messages %}{{ m.content }}" + CALL + "{% endfor %}"
    )
    found = traits_of(template)
    assert (found.failures, found.traits.foreign_tools) == ({}, False)
    assert json.loads(prompt(template, ASKED[:1], [WEATHER])[1:].partition(" on D")[0]) == [WEATHER["function"]]
    assert prompt(template, ASKED[:1]).startswith("F[] on D")


def test_a_template_that_knows_no_unions_gets_one_type_for_each_parameter() -> None:
    template = (
        "{% macro kind(s) %}{% if s.type is not string or s.type in ('null', 'any') %}{{ raise_exception('type') }}"
        "{% endif %}{{ s.type }}{% if s.type == 'object' %} of {{ kind(s.additionalProperties) }}{% endif %}"
        "{% endmacro %}{% for t in tools or [] %}{{ t.function.name }}("
        "{% for k, s in t.function.parameters.properties | items %}"
        "{{ k + ': ' + kind(s) + s.description }}, {% endfor %}){% endfor %}" + PRINTED_CALLS
    )
    assert traits_of(template).failures == {}
    assert prompt(template, ASKED[:1], [SEARCH]) == (
        "search_all(text: stringD-one, count: integer, share: number, sure: boolean, unit: string, maybe: string, "
        "either: integer, any: string, list: array, texts: array, map: object of string, point: object of string, "
        "points: array, )U"
    )


@pytest.mark.parametrize("arguments", ["{{ a }}", "{{ a | tojson }}", "{% for k, v in a.items() %}{{ v }}{% endfor %}"])
def test_arguments_are_what_the_template_wants(arguments: str) -> None:
    template = (
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{% for m in messages %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% set a = c.function.arguments %}"
        "{% if a is mapping and wants_text %}{{ raise_exception('text') }}{% endif %}"
        f"{arguments}{{% endfor %}}{{% endfor %}}"
    )
    for one in (template, "{% set wants_text = true %}" + template) if "items" not in arguments else (template,):
        found = traits_of(one)
        assert found.failures == {}
        assert found.traits.text_arguments == one.startswith("{% set")


TEMPLATES = [
    pytest.param(file.read_text(), id=file.stem)
    for folder in [os.environ.get("LLAMAHERD_TEST_TEMPLATES")]
    if folder
    for file in sorted(Path(folder).glob("*.jinja"))
]


@pytest.mark.skipif(
    not TEMPLATES, reason="LLAMAHERD_TEST_TEMPLATES names no folder such as llama.cpp's models/templates"
)
@pytest.mark.parametrize("template", TEMPLATES)
def test_real_templates_print_every_kind_of_conversation(template: str) -> None:
    assert traits_of(template).failures == {}


async def test_a_requests_variables_cannot_replace_the_messages(rendered: Renderer) -> None:
    assert await rendered("{{ messages | length }}", messages=[]) == "2"


@pytest.mark.parametrize(
    ("add_bos", "prompt", "adds"), [(True, "hello", True), (True, "<s>hello", False), (False, "hello", False)]
)
def test_bos_is_added_once_at_most(add_bos: bool, prompt: str, adds: bool) -> None:
    assert adds_special(msgspec.structs.replace(MODEL, add_bos=add_bos), prompt) is adds


@pytest.mark.skipif(not TEMPLATES, reason="see above")
@pytest.mark.parametrize("template", TEMPLATES)
def test_calls_are_read_as_real_templates_print_them(template: str) -> None:
    found = traits_of(template)
    form, traits = form_of(found.shape) if found.shape else format_of(template), found.traits
    if form is None or traits.foreign_tools:
        pytest.skip("is given Hermes' format")
    arguments = {"place": 'Zürich "West"', "days": 2, "deep": {"a": ["x", 1.5]}}
    properties = {"place": {"type": "string"}, "days": {"type": "integer"}, "deep": {"type": "object"}}
    parameters = {"type": "object", "properties": properties}
    names = ["get_weather", "get_climate"] if form.joined is not None and not traits.single_calls else ["get_weather"]
    tools = [
        {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}} for name in names
    ]
    made = [
        {"id": f"call0000{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for number, name in enumerate(names)
    ]
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "U-one"},
        {"role": "assistant", "content": "", "tool_calls": made},
        *({"role": "tool", "tool_call_id": f"call0000{n}", "content": "R-one"} for n, _ in enumerate(names)),
    ]
    printed = prompt_of(Prompting(template, turns, tools, traits, {"bos_token": "<s>", "eos_token": "</s>"}))
    answer = printed.rpartition("U-one")[2].partition("R-one")[0]
    if form is HARMONY:
        answer = answer.partition("<|start|>assistant")[2]
    if form.bare:
        answer = answer[answer.index("{") :]
    turn = found.turn
    reader = Reader(form, turn.thinking, False, dict.fromkeys(names, parameters), True, turn.skipped)
    calls = [(one.name, json.loads(one.arguments)) for one in reader.whole(answer).calls]
    assert calls == [(name, arguments) for name in names]
