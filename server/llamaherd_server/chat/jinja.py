"""Renders chat templates. They are untrusted code from a model file, so this runs only in a sandboxed child."""

from __future__ import annotations

import datetime
import functools
import json
from typing import Any, NoReturn

import msgspec
from jinja2 import Template, TemplateError, Undefined, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import SandboxedEnvironment

OUTPUT_CHARS = 8 * 2**20


class Rendering(msgspec.Struct):
    """A template and its variables."""

    template: str
    context: dict[str, Any]


def render(rendering: Rendering) -> str:
    """Render the prompt. Raises ValueError if it is longer than OUTPUT_CHARS."""
    pieces, length = [], 0
    for piece in _compiled(rendering.template).generate(rendering.context):
        length += len(piece)
        if length > OUTPUT_CHARS:
            raise ValueError(f"the output is longer than {OUTPUT_CHARS} characters")
        pieces.append(piece)
    return "".join(pieces)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, transformers' markup for the assistant's text. It prints its content."""

    tags = {"generation"}  # noqa: RUF012 (as declared in Extension)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=4)
def _compiled(template: str) -> Template:
    # Templates are written for transformers' apply_chat_template, so this offers the same. Unlike there, lists are
    # mutable, as in llama.cpp.
    environment = SandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, default=_listed, **options)


def _listed(value: Any) -> Any:
    """Convert what filters such as `map` return to a list, and an undefined value to null."""
    return None if isinstance(value, Undefined) else list(value)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().astimezone().strftime(pattern)
