"""Tools of a request: what the model is told of them, and the grammar that holds it to them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llamaherd_server.chat.formats import HARMONY, QWEN_CODER, Format, Reader
from llamaherd_server.chat.gbnf import literal, without
from llamaherd_server.chat.schema import grammar_of, schema_rules
from llamaherd_server.errors import ApiError

_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_ANNOTATIONS = ("title", "description", "default", "examples")
# What a model whose template knows no tools is told: the words of Qwen2.5's template, in Hermes' format.
_INTRODUCTION = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool

    @property
    def schema(self) -> dict[str, Any]:
        return _NO_ARGUMENTS if self.parameters is None else self.parameters

    def for_template(self) -> dict[str, Any]:
        """As transformers' templates expect it."""
        function = {"name": self.name, "description": self.description or "", "parameters": self.schema}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Choice:
    """Which of the tools may, or must, be called. `must`: at least one; `parallel`: more than one at once."""

    tools: Sequence[Tool]
    must: bool = False
    parallel: bool = True

    @property
    def enforced(self) -> bool:
        """Whether a grammar is needed."""
        return self.must or any(tool.strict for tool in self.tools)


def reply_grammar(reader: Reader, choice: Choice, answer: dict[str, str] | None = None) -> str | None:
    """What the reply must look like; None: as the model likes.

    `answer`: the rules of what is said when nothing is called, begun by `answer`. Raises ApiError for a tool's schema
    that cannot be enforced.
    """
    form, roots = reader.form, []
    rules: dict[str, str] = {}
    if form and choice.tools and (choice.enforced or answer):
        rules |= _call_rules(form, choice)
        roots.append("calls")
    if not roots and answer is None:
        return None
    if not choice.must:
        final = '"<|channel|>final<|message|>" ' if form is HARMONY else ""
        if answer is None and form:
            rules |= without("answer", (form.opens, *form.skipped[:1]), not_first="{" if form.bare else "")
            roots.append(f"{final}answer" if form is HARMONY or form.joined is None else "answer calls?")
        else:
            rules |= answer or {}
            roots.append(f"{final}answer")
    rules["root"] = " | ".join(roots)
    return grammar_of(_after_thinking(reader, rules))


def _call_rules(form: Format, choice: Choice) -> dict[str, str]:
    rules: dict[str, str] = {}
    alternatives = []
    for number, tool in enumerate(choice.tools):
        name = f"tool-{number}"
        rules |= _parameters(tool, name) if form is QWEN_CODER else schema_rules(tool.schema, "tools", name)
        alternatives.append(f"({form.call_rule(tool.name, name)})")
    more = f"({form.joined} call)*" if choice.parallel and form.joined is not None else ""
    return {**rules, "call": " | ".join(alternatives), "calls": f"{form.before} call {more} {form.after}"}


def _after_thinking(reader: Reader, rules: dict[str, str]) -> dict[str, str]:
    if reader.form is HARMONY:
        thought = '("<|channel|>analysis<|message|>" thought "<|end|><|start|>assistant")?'
        markers: tuple[str, ...] = ("<|end|>",)
    elif reader.thinking is not None:
        begin, end = reader.thinking
        thought = f"thought {literal(end)} [ \\n]{{0,4}}"
        if not reader.thinks:
            thought = f"({literal(begin)} {thought})?"
        markers = (end,)
    else:
        return rules
    return {**rules, **without("thought", markers), "root": f"{thought} ({rules['root']})"}


def _parameters(tool: Tool, name: str) -> dict[str, str]:
    """The rules of a call's parameters where each is an element of text."""
    properties, required = tool.schema.get("properties", {}), tool.schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise ApiError(400, f"tools: the schema of {tool.name!r} is not one", param="tools", code="invalid_schema")
    rules = without("xml-text", ("\n</parameter>",))
    sequence = []
    for number, (key, schema) in enumerate(properties.items()):
        value = f"{name}-p{number}"
        rules |= _xml_value(tool, key, schema, value)
        element = f"{literal(f'<parameter={key}>' + chr(10))} {value} {literal(chr(10) + '</parameter>' + chr(10))}"
        sequence.append(element if key in required else f"({element})?")
    rules[name] = " ".join(sequence) or '""'
    return rules


def _xml_value(tool: Tool, key: str, schema: Any, name: str) -> dict[str, str]:
    if not isinstance(schema, dict) or schema.get("type") != "string":
        return schema_rules(schema, "tools", name)
    rest = {word: value for word, value in schema.items() if word not in (*_ANNOTATIONS, "type")}
    values = rest.pop("enum", None)
    if rest or (values is not None and not (values and all(isinstance(value, str) for value in values))):
        message = f"tools: {tool.name}.{key}: a string can be held to an enum of texts only, in this model's format"
        raise ApiError(400, message, param="tools", code="invalid_schema")
    return {name: " | ".join(map(literal, values)) if values else "xml-text"}


def told(messages: list[dict[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The messages for a template that knows no tools: they go into the system message, calls and results are text."""
    introduction = _INTRODUCTION.format(tools="\n".join(_json(tool.for_template()) for tool in tools)) if tools else ""
    result: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if result and result[-1].get("tool_results"):
                result[-1]["content"] += f"\n{text}"
            else:
                result.append({"role": "user", "content": text, "tool_results": True})
        elif calls := message.get("tool_calls"):
            written = "\n".join(f"<tool_call>\n{_json(call['function'])}\n</tool_call>" for call in calls)
            result.append({"role": "assistant", "content": "\n".join(filter(None, (message["content"], written)))})
        else:
            result.append(message)
    for message in result:
        message.pop("tool_results", None)
    if not introduction:
        return result
    if result[0]["role"] == "system":
        first = {**result[0], "content": f"{result[0]['content']}\n\n{introduction}".lstrip()}
        return [first, *result[1:]]
    return [{"role": "system", "content": introduction}, *result]


def with_ids_of(length: int, messages: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The messages with call ids of `length` letters and digits, which Mistral's templates insist on."""

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


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
