"""Chat templates in their sandbox: rendered as transformers does, contained when they misbehave."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from llamaherd_server.chat.sandbox import Sandbox
from llamaherd_server.chat.template import adds_special, render
from llamaherd_server.errors import ApiError

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
        "{{ messages.append(1) }}",
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


async def test_a_requests_variables_cannot_replace_the_messages(rendered: Renderer) -> None:
    assert await rendered("{{ messages | length }}", messages=[]) == "2"


@pytest.mark.parametrize(
    ("add_bos", "prompt", "adds"), [(True, "hello", True), (True, "<s>hello", False), (False, "hello", False)]
)
def test_bos_is_added_once_at_most(add_bos: bool, prompt: str, adds: bool) -> None:
    assert adds_special(msgspec.structs.replace(MODEL, add_bos=add_bos), prompt) is adds
