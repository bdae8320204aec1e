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
from llamaherd_server.chat.template import adds_special, render
from llamaherd_server.errors import ApiError
from llamaherd_server.sandbox.pool import Sandbox
from llamaherd_server.toolcalls.derived import form_of
from llamaherd_server.toolcalls.formats import HARMONY, format_of, thinking_of
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
# It asks for variables of its own, which transformers has none of either.
UNLIKE_ALL = "fireworks-ai-llama-3-firefunction-v2"


@pytest.mark.skipif(
    not TEMPLATES, reason="LLAMAHERD_TEST_TEMPLATES names no folder such as llama.cpp's models/templates"
)
@pytest.mark.parametrize("template", TEMPLATES)
def test_real_templates_print_every_kind_of_conversation(template: str, request: pytest.FixtureRequest) -> None:
    failures = traits_of(template).failures
    assert failures == {} or UNLIKE_ALL in request.node.name


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
    parameters = {"type": "object", "properties": {"place": {"type": "string"}, "days": {}, "deep": {"type": "object"}}}
    tool = {"type": "function", "function": {"name": "get_weather", "description": "", "parameters": parameters}}
    call = {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "U-one"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call00001", "name": "get_weather", "content": "R-one"},
    ]
    printed = prompt_of(Prompting(template, turns, [tool], traits, {"bos_token": "<s>", "eos_token": "</s>"}))
    answer = printed.rpartition("U-one")[2].partition("R-one")[0]
    if form is HARMONY:
        answer = answer.partition("<|start|>assistant")[2]
    if form.bare:
        answer = answer[answer.index("{") :]
    calls = Reader(form, thinking_of(template), False, {"get_weather": parameters}).whole(answer).calls
    assert [(one.name, json.loads(one.arguments)) for one in calls][:1] == [("get_weather", arguments)]
