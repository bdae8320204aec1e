"""A request's tools: what the template gets of them, and the grammar that enforces calls and answer schemas."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from llamaherd_server.errors import ApiError
from llamaherd_server.grammar.gbnf import literal, without
from llamaherd_server.grammar.schema import arguments_rules, bare_rules, grammar_of, schema_rules
from llamaherd_server.grammar.subschemas import property_kinds
from llamaherd_server.sandbox.pool import Sandbox, SandboxError
from llamaherd_server.toolcalls.derived import Shape, form_of
from llamaherd_server.toolcalls.elements import Elements
from llamaherd_server.toolcalls.formats import FORMATS, HARMONY, Format, Keywords
from llamaherd_server.toolcalls.marks import KEY
from llamaherd_server.toolcalls.reader import Reader

# Limits for converting schemas, apart from compiling the grammar. The largest of zod's and pydantic's takes 0.3 s.
_CPU_S, _PATIENCE = 1.0, 2.5
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool

    @property
    def schema(self) -> dict[str, Any]:
        return self.parameters or _NO_ARGUMENTS

    def for_template(self) -> dict[str, Any]:
        """Return the tool as transformers' templates expect it."""
        function = {"name": self.name, "description": self.description or "", "parameters": self.schema}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Choice:
    """The tools that may be called. `must`: at least one call is required; `parallel`: several calls are allowed."""

    tools: Sequence[Tool]
    must: bool = False
    parallel: bool = True

    @property
    def enforced(self) -> bool:
        """Whether a grammar is needed."""
        return self.must or any(tool.strict for tool in self.tools)


class AnswerSchema(msgspec.Struct):
    """The JSON schema of an answer. `field`: the request's field that contains it."""

    json_schema: Any
    field: str
    strict: bool


class Reply(msgspec.Struct):
    """What the grammar of a reply depends on. `form`: a format's name, or its shape; for the others, see Reader."""

    form: str | Shape | None
    thinking: tuple[str, str] | None
    thinks: bool
    choice: Choice
    answer: AnswerSchema | None
    prompted: str = ""
    resumed: str = ""
    said: str = ""


async def reply_grammar(
    sandbox: Sandbox,
    reader: Reader,
    choice: Choice,
    answer: AnswerSchema | None = None,
    shape: Shape | None = None,
) -> str | None:
    """Return the reply's grammar; None: none is needed. Raises ApiError if a schema cannot be enforced.

    `shape`: the shape that the reader's format was derived from, if it is of no known family.
    """
    if answer is None and not (reader.form and choice.tools and choice.enforced):
        return None
    form = shape or (reader.form.name if reader.form else None)
    try:
        wanted = Reply(form, reader.thinking, reader.thinks, choice, answer, *reader.around)
        return await sandbox.in_child(grammar_of_reply, wanted, _CPU_S, _PATIENCE)
    except SandboxError as error:
        param = answer.field if answer else "tools"
        raise ApiError(400, f"{param}: the schema {error}", param=param, code="invalid_schema") from None


def grammar_of_reply(reply: Reply) -> str | None:
    """Return the reply's grammar. Runs in a sandboxed child. Raises ApiError."""
    if isinstance(reply.form, Shape):
        form: Format | None = form_of(reply.form)
    else:
        form = next((one for one in FORMATS if one.name == reply.form), None)
    choice, answer = reply.choice, reply.answer
    rules: dict[str, str] = {}
    roots = []
    if form and choice.tools and (choice.enforced or answer):
        rules |= _call_rules(form, choice)
        roots.append("calls")
    if not roots and answer is None:
        return None
    if not choice.must:
        final = '"<|channel|>final<|message|>" ' if form is HARMONY else f"{literal(reply.said)} " if reply.said else ""
        later = f"({literal(reply.prompted)} calls)?" if reply.prompted else "calls?"
        if answer is None and form:
            rules |= without("answer", (form.opens, *form.skipped[:1]), not_first="{" if form.bare else "")
            alone = form is HARMONY or form.joined is None
            roots.append(f"{final}answer" if alone else f"{final}answer {later}")
        elif answer is not None:
            rules |= schema_rules(answer.json_schema, answer.field, "answer", strict=answer.strict)
            roots.append(f"{final}answer")
    rules["root"] = " | ".join(roots)
    return grammar_of(_after_thinking(form, reply, rules))


def _call_rules(form: Format, choice: Choice) -> dict[str, str]:
    rules: dict[str, str] = {}
    alternatives = []
    for number, tool in enumerate(choice.tools):
        name = f"tool-{number}"
        rules |= _arguments(form, tool, name)
        alternatives.append(f"({form.call_rule(tool.name, name)})")
    more = f"({form.joined} call)*" if choice.parallel and form.joined is not None else ""
    return {**rules, "call": " | ".join(alternatives), "calls": f"{form.before} call {more} {form.after}"}


def _after_thinking(form: Format | None, reply: Reply, rules: dict[str, str]) -> dict[str, str]:
    if form is HARMONY:
        thought = '("<|channel|>analysis<|message|>" thought "<|end|><|start|>assistant")?'
        markers: tuple[str, ...] = ("<|end|>",)
    elif reply.thinking is not None:
        begin, end = reply.thinking
        again = f"({literal(reply.resumed)})?" if reply.resumed else ""
        thought = f"thought {literal(end)} [ \\n]{{0,4}} {again}"
        if not reply.thinks:
            thought = f"({literal(begin)} {thought})?"
        markers = (end,)
    else:
        return rules
    return {**rules, **without("thought", markers), "root": f"{thought} ({rules['root']})"}


def _arguments(form: Format, tool: Tool, name: str) -> dict[str, str]:
    """Return the rules for a call's arguments, with the start rule `name`."""
    if form.elements:
        return _elements(form.elements, tool, name)
    if form.keywords:
        return _keywords(form.keywords, tool, name)
    return arguments_rules(tool.schema, "tools", name, strict=tool.strict)


def _elements(form: Elements, tool: Tool, name: str) -> dict[str, str]:
    kinds = property_kinds(tool.schema)
    elements = []
    end = form.parameter_end.partition(KEY)[0].rstrip("\n")
    rules, members = bare_rules(tool.schema, "tools", name, strict=tool.strict, end=end)
    for key, value, required in members:
        head = literal(key.join(form.parameter))
        if form.typed:
            head = f"{head} ({' | '.join(map(literal, form.words_of(kinds.get(key))))}) {literal(form.typed)}"
        elements.append(f"({head} {value} {literal(form.end_of(key))}){'' if required else '?'}")
    return {**rules, name: " ".join(elements) or '""'}


def _keywords(form: Keywords, tool: Tool, name: str) -> dict[str, str]:
    end = form.quote or None
    rules, members = bare_rules(tool.schema, "tools", name, strict=tool.strict, end=end, quote=form.quote)
    rest, left, must = '""', '""', False  # remaining pairs with, without separator; whether one is required
    for number, (key, value, required) in reversed(list(enumerate(members))):
        pair = f"{literal(key + form.between)} {value} {rest}"
        must = must or required
        rules[f"{name}-k{number}"] = pair if required or left == '""' else f"{pair} | {left}"
        left = f"{name}-k{number}"
        rest = f"{literal(form.separator)} {left}" if must else f"({literal(form.separator)} {left})?"
    return {**rules, name: left if must or left == '""' else f"{left}?"}


def with_ids_of(length: int, messages: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the messages with call ids of `length` letters and digits, as Mistral's templates require."""

    def short(call_id: str) -> str:
        fits = len(call_id) == length and call_id.isalnum()
        return call_id if fits else hashlib.sha256(call_id.encode()).hexdigest()[:length]

    for message in messages:
        changed = dict(message)
        if "tool_call_id" in message:
            changed["tool_call_id"] = short(message["tool_call_id"])
        if "tool_calls" in message:
            changed["tool_calls"] = [{**call, "id": short(call["id"])} for call in message["tool_calls"]]
        yield changed
