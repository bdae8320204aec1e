"""The bodies of tool calls, as the model families write them; each reads one call, or raises Malformed."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from typing import Any, TypeAlias

from llamaherd_server.chat.reply import Malformed, Source, Writer
from llamaherd_server.chat.subschemas import is_of, property_kinds
from llamaherd_server.chat.surrogates import without_halves

Schemas: TypeAlias = Mapping[str, Any]  # the parameters' schema by the tool's name
Body: TypeAlias = Callable[[Source, Writer, Schemas], Generator[None, None, None]]
_ARGUMENTS = ("arguments", "parameters")


def json_call(source: Source, writer: Writer, _: Schemas) -> Generator[None, None, None]:
    """`{"name": …, "arguments": {…}}`, its members in any order; "parameters" is Llama's word for arguments."""
    name, held, begun = "", "", False
    yield from source.expect("{")
    while True:
        key = yield from _value(source)
        yield from source.expect(":")
        if key == "name":
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
    """Mistral's list of such objects; a single object too."""
    yield from source.spaces()
    if not (yield from source.literal("[")):
        yield from json_call(source, writer, {})
        return
    while True:
        yield from json_call(source, writer, {})
        source.mark()  # what is told already is not content, whatever comes
        yield from source.spaces()
        if (yield from source.literal("]")):
            return
        yield from source.expect(",")


def named_call(source: Source, writer: Writer, _: Schemas) -> Generator[None, None, None]:
    """Mistral's newer form: `name[ARGS]{…}`, with a `[CALL_ID]…` before the arguments in some."""
    head = yield from _before(source, "[ARGS]")
    yield from _stream(source, writer, head.partition("[CALL_ID]")[0].strip())


def deepseek_call(source: Source, writer: Writer, _: Schemas) -> Generator[None, None, None]:
    """`name<｜tool▁sep｜>{…}` (V3.1), or `function<｜tool▁sep｜>name` and the arguments in a fence (V3, R1)."""
    name = (yield from _before(source, "<｜tool▁sep｜>")).strip()
    if name == "function":
        name = (yield from _before(source, "\n")).strip()
        yield from source.expect("```json")
        yield from _stream(source, writer, name)
        yield from source.expect("```")
    else:
        yield from _stream(source, writer, name)


def xml_call(source: Source, writer: Writer, schemas: Schemas) -> Generator[None, None, None]:
    """Qwen3-Coder's `<function=name><parameter=key>value</parameter>…</function>`; values are typed by the schema."""
    yield from source.expect("<function=")
    name = yield from _before(source, ">")
    kinds = property_kinds(schemas.get(name))
    writer.begin_call(name)
    separator = "{"
    while True:
        yield from source.spaces()
        if (yield from source.literal("</function>")):
            break
        yield from source.expect("<parameter=")
        key = yield from _before(source, ">")
        value = (yield from _before(source, "</parameter>")).removeprefix("\n").removesuffix("\n")
        writer.arguments(f"{separator}{_json(key)}: {_typed(value, kinds.get(key))}")
        separator = ", "
    writer.arguments("}" if separator == ", " else "{}")


def _stream(source: Source, writer: Writer, name: str) -> Generator[None, None, bool]:
    """Tell a call whose arguments come next, as they come."""
    yield from source.spaces()
    if not name or not source.rest:
        raise Malformed
    if source.rest[0] != "{":  # a quoted object, or null
        given = _unquoted((yield from _text(source))) or "{}"
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


def _before(source: Source, marker: str) -> Generator[None, None, str]:
    parts: list[str] = []
    if (yield from source.until((marker,), parts.append)) is None:
        raise Malformed
    return "".join(parts)


def _unquoted(text: str) -> str:
    """Arguments that some models put into a string, as the object that they are."""
    if text.startswith('"'):
        text = str(_loads(text))
    return "" if text.strip() == "null" else text


def _typed(value: str, kinds: frozenset[str] | None) -> str:
    """A parameter's text as JSON: as JSON where it is that, and of a type that is allowed; else as a string."""
    if kinds is None or kinds != {"string"}:
        with suppress(Malformed, RecursionError):
            found = _loads(value)
            if not kinds or "string" not in kinds or any(is_of(found, kind) for kind in kinds):
                return _json(found)
    return _json(value)


def _loads(text: str) -> Any:
    try:
        return json.loads(without_halves(text))
    except (ValueError, RecursionError):
        raise Malformed from None


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
