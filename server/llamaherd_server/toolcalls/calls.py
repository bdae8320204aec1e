"""Readers for the bodies of tool calls, one for each way in which models write them. They raise Malformed."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Container, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

from llamaherd_server.grammar.subschemas import is_of
from llamaherd_server.toolcalls.reply import Malformed, Source, Writer
from llamaherd_server.toolcalls.surrogates import without_lone_surrogates

Schemas: TypeAlias = Mapping[str, Any]  # parameter schemas by tool name
CallReader: TypeAlias = Callable[[Source, Writer, Schemas], Generator[None, None, None]]
Calls: TypeAlias = list[tuple[str, Any]]  # names and arguments
_NAME, _ARGUMENTS = ("name", "tool_name"), ("arguments", "parameters")


def json_call(source: Source, writer: Writer, _: Schemas) -> Generator[None, None, None]:
    """Read `{"name": …, "arguments": {…}}`, with members in any order, or with the keys that Llama and Cohere use."""
    name, held, begun = "", "", False
    yield from source.expect("{")
    while True:
        key = yield from _value(source)
        yield from source.expect(":")
        if key in _NAME:
            found = yield from _value(source)
            if begun or not isinstance(found, str) or not found:
                raise Malformed
            name = found
        elif key in _ARGUMENTS and name and not begun:
            begun = yield from _stream(source, writer, name)
        else:
            text = yield from _text(source)
            held = text if key in _ARGUMENTS else held
        yield from source.spaces()
        if (yield from source.literal("}")):
            break
        yield from source.expect(",")
    if not name:
        raise Malformed
    if not begun:
        given = _unquoted(held) or "{}"
        writer.begin_call(name)
        writer.arguments(given)


def json_calls(source: Source, writer: Writer, _: Schemas) -> Generator[None, None, None]:
    """Read Mistral's list of such objects, or a single object."""
    yield from source.spaces()
    if not (yield from source.literal("[")):
        yield from json_call(source, writer, {})
        return
    while True:
        yield from json_call(source, writer, {})
        source.mark()  # a call already emitted never becomes content
        yield from source.spaces()
        if (yield from source.literal("]")):
            return
        yield from source.expect(",")


def named_call(source: Source, writer: Writer, _: Schemas) -> Generator[None, None, None]:
    """Read Mistral's newer format: `name[ARGS]{…}`, in some models with `[CALL_ID]…` before `[ARGS]`."""
    head = yield from before(source, "[ARGS]")
    yield from _stream(source, writer, head.partition("[CALL_ID]")[0].strip())


def call_before(
    source: Source, writer: Writer, markers: Sequence[str], known: Container[str] | None = None
) -> Generator[None, None, None]:
    """Read a name (one of `known`, if given), the markers with any text between them, and the arguments as JSON."""
    name = (yield from before(source, markers[0])).strip()
    if len(name.split()) > 1 or (known is not None and name not in known):
        raise Malformed
    for marker in markers[1:]:
        yield from before(source, marker)
    yield from _stream(source, writer, name, strict=True)


def deepseek_call(source: Source, writer: Writer, _: Schemas) -> Generator[None, None, None]:
    """Read `name<｜tool▁sep｜>{…}` (V3.1), or `function<｜tool▁sep｜>name` and fenced arguments (V3, R1)."""
    name = (yield from before(source, "<｜tool▁sep｜>")).strip()
    if name == "function":
        name = (yield from before(source, "\n")).strip()
        yield from source.expect("```json")
        yield from _stream(source, writer, name)
        yield from source.expect("```")
    else:
        yield from _stream(source, writer, name)


def kimi_call(source: Source, writer: Writer, _: Schemas) -> Generator[None, None, None]:
    """Read `functions.name:0<|tool_call_argument_begin|>{…}`."""
    head = (yield from before(source, "<|tool_call_argument_begin|>")).strip()
    yield from _stream(source, writer, head.removeprefix("functions.").rpartition(":")[0])


# A string up to a quote followed by a bracket, comma or colon. Other quotes in it need not be escaped.
_BARE_STRING = re.compile(r"""(['"])(.*?)(?<!\\)\1(?=\s*[])},:])""", re.DOTALL)


def _as_literal(found: re.Match[str]) -> str:
    """Return a string match as a valid Python literal, even if its text is not escaped."""
    with suppress(SyntaxError, ValueError):
        return repr(ast.literal_eval(found[0]))
    return repr(found[2])


def keyword_calls(source: Source, writer: Writer, _: Schemas) -> Generator[None, None, None]:
    """Read LFM2's `[name(key=value, …), …]` in Python syntax."""
    text = (yield from before(source, "<|tool_call_end|>")).strip()
    try:
        try:
            parsed = ast.parse(text, mode="eval").body
        except SyntaxError:
            parsed = ast.parse(_BARE_STRING.sub(_as_literal, text), mode="eval").body
        calls = [_keyword_call(one) for one in (parsed.elts if isinstance(parsed, ast.List) else [parsed])]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise Malformed from None
    for name, arguments in calls:
        writer.begin_call(name)
        writer.arguments(json_text(arguments))


def written_keywords(calls: Calls) -> str:
    """Return calls in the format that `keyword_calls` reads."""
    pairs = [
        (name, ", ".join(f"{key}={json_text(value)}" for key, value in _mapping(arguments).items()))
        for name, arguments in calls
    ]
    return f"<|tool_call_start|>[{', '.join(f'{name}({text})' for name, text in pairs)}]<|tool_call_end|>"


def written_list(calls: Calls) -> str:
    """Return calls as Granite's list of JSON objects."""
    return f"<|tool_call|>{json_text([{'name': name, 'arguments': arguments} for name, arguments in calls])}"


def _mapping(arguments: Any) -> dict[str, Any]:
    return arguments if isinstance(arguments, dict) else {"arguments": arguments}


def _keyword_call(node: ast.expr) -> tuple[str, dict[str, Any]]:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError
    return ast.unparse(node.func), {one.arg: _literal(one.value) for one in node.keywords if one.arg}


def _literal(node: ast.expr) -> Any:
    """Return the value of a Python literal, which may contain JSON's true, false and null, or bare names as strings."""
    if isinstance(node, ast.Name):
        return {"true": True, "false": False, "null": None}.get(node.id, node.id)
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(one) for one in node.elts]
    if isinstance(node, ast.Dict):
        return {_literal(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True) if key}
    return ast.literal_eval(node)


_GEMMA_TOKEN = re.compile(
    r'<\|"\|>(?P<text>.*?)<\|"\|>|(?P<json>"(?:\\.|[^"\\])*")|(?P<sign>[][{}:,])|(?P<bare>[^][{}:,]+)', re.DOTALL
)


def gemma_call(source: Source, writer: Writer, _: Schemas) -> Generator[None, None, None]:
    """Read `call:name{key:<|"|>text<|"|>,other:[1,true]}<tool_call|>`."""
    yield from source.expect("call:")
    text = yield from before(source, "<tool_call|>")
    name, brace, rest = text.partition("{")
    tokens = [
        (match.lastgroup or "", match[match.lastgroup or ""])
        for match in _GEMMA_TOKEN.finditer(brace + rest)
        if match[0].strip()
    ]
    try:
        arguments = _gemma_value(iter(tokens)) if tokens else {}
    except (StopIteration, ValueError, RecursionError):
        raise Malformed from None
    writer.begin_call(name.strip())
    writer.arguments(json_text(arguments))


def _gemma_value(tokens: Iterator[tuple[str, str]]) -> Any:
    """Return the next value. Raises StopIteration if the tokens end, and ValueError."""
    return _gemma_from(next(tokens), tokens)


def _gemma_from(first: tuple[str, str], tokens: Iterator[tuple[str, str]]) -> Any:
    kind, text = first
    if kind == "text":
        return text
    if kind == "json":
        return json.loads(text)
    if kind == "bare":
        with suppress(ValueError):
            return json.loads(text)
        return {"None": None, "True": True, "False": False}.get(text.strip(), text.strip())
    if text not in "{[":
        raise ValueError
    members: dict[str, Any] = {}
    items: list[Any] = []
    while (token := next(tokens)) not in (("sign", "}"), ("sign", "]")):
        if token == ("sign", ","):
            continue
        if text == "[":
            items.append(_gemma_from(token, tokens))
            continue
        key = _gemma_from(token, tokens)
        if next(tokens) != ("sign", ":"):
            raise ValueError
        members[token[1].strip() if token[0] == "bare" else key] = _gemma_value(tokens)
    return members if text == "{" else items


def _stream(source: Source, writer: Writer, name: str, *, strict: bool = False) -> Generator[None, None, bool]:
    """Emit a call and its arguments as they arrive. `strict`: raise Malformed if they are not an object."""
    yield from source.spaces()
    if not name or not source.rest:
        raise Malformed
    if source.rest[0] != "{":  # a quoted object, or null
        given = _unquoted((yield from _text(source))) or "{}"
        if strict and not given.lstrip().startswith("{"):
            raise Malformed
        writer.begin_call(name)
        writer.arguments(given)
        return True
    writer.begin_call(name)
    source.mark()
    yield from source.json(writer.arguments)
    return True


def _value(source: Source) -> Generator[None, None, Any]:
    return _loads((yield from _text(source)))


def _text(source: Source) -> Generator[None, None, str]:
    parts: list[str] = []
    yield from source.json(parts.append)
    return "".join(parts)


def before(source: Source, marker: str) -> Generator[None, None, str]:
    """Return the text before `marker` and consume both. Raises Malformed if the marker is missing."""
    parts: list[str] = []
    if (yield from source.until((marker,), parts.append)) is None:
        raise Malformed
    return "".join(parts)


def _unquoted(text: str) -> str:
    """Return the object inside arguments that a model wrote as a JSON string; "" for null."""
    if text.startswith('"'):
        text = str(_loads(text))
    return "" if text.strip() == "null" else text


def typed(value: str, kinds: frozenset[str] | None) -> str:
    """Return a parameter's text as JSON: unchanged if it is JSON of an allowed type, otherwise as a string.

    If no string is allowed, a Python literal is converted as well, because some templates print mappings that way.
    """
    if kinds is None or kinds != {"string"}:
        with suppress(Malformed, RecursionError):
            found = _loads(value)
            if not kinds or "string" not in kinds or any(is_of(found, kind) for kind in kinds):
                return json_text(found)
    if kinds and "string" not in kinds:
        with suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return json_text(ast.literal_eval(value.strip()))
    return json_text(value)


def _loads(text: str) -> Any:
    try:
        return json.loads(without_lone_surrogates(text))
    except (ValueError, RecursionError):
        raise Malformed from None


def json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
