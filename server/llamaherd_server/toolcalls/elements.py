"""Calls whose arguments are elements with text, one per parameter. Objects and lists may be nested elements."""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from llamaherd_server.grammar.subschemas import kinds_at, property_kinds
from llamaherd_server.toolcalls.calls import Schemas, before, json_text, typed
from llamaherd_server.toolcalls.marks import ID, KEY, NUMBER
from llamaherd_server.toolcalls.reply import Malformed, Source, Writer


@dataclass(frozen=True, slots=True)
class Elements:
    """The texts before and after a function's name (`call`) and a parameter's (`parameter`), and at the end of both.

    `padding`: around values. `types`: the word between a parameter's name and `typed`, by the value's JSON type
    (`string`, or "" for any other). `item`: the name of a list's elements if values are nested elements.
    `quotes`: around text that contains markup.
    """

    call: tuple[str, str]
    call_end: str
    parameter: tuple[str, str]
    parameter_end: str
    padding: str = ""
    types: tuple[tuple[str, str], ...] = ()
    typed: str = ""
    item: str = ""
    quotes: tuple[str, str] = ("", "")

    def body(self, source: Source, writer: Writer, schemas: Schemas) -> Generator[None, None, None]:
        """Read one or more calls."""
        yield from source.expect(self.call[0])
        while True:
            yield from self.call_one(source, writer, schemas)
            source.mark()  # a call already emitted never becomes content
            yield from source.spaces()
            if not (yield from source.literal(self.call[0])):
                return

    def call_one(self, source: Source, writer: Writer, schemas: Schemas) -> Generator[None, None, None]:
        first, *more = re.split(f"[{ID}{NUMBER}]", self.call[1].rstrip())
        name = yield from before(source, first)
        for mark in more:
            yield from before(source, mark)
        schema = schemas.get(name)
        kinds = property_kinds(schema)
        writer.begin_call(name)
        separator = "{"
        while True:
            yield from source.spaces()
            if (yield from source.literal(self.call_end.rstrip())):
                break
            yield from source.expect(self.parameter[0])
            first, *more = self.parameter[1].split()
            key = yield from before(source, first)
            for mark in more:
                yield from source.expect(mark)
            of_key = kinds.get(key)
            if self.typed and (yield from before(source, self.typed)) == dict(self.types)["string"]:
                of_key = frozenset(("string",))
            value = yield from self._value(source, key)
            value = value.removeprefix(self.padding).removesuffix(self.padding)
            written = json_text(self._tree(value, schema, (key,))) if self.item else typed(value, of_key)
            writer.arguments(f"{separator}{json_text(key)}: {written}")
            separator = ", "
        writer.arguments("}" if separator == ", " else "{}")

    def end_of(self, key: str) -> str:
        return self.parameter_end.replace(KEY, key)

    def words_of(self, kinds: frozenset[str] | None) -> list[str]:
        """Return the words in `types` for these JSON types. Without types, return all words except that for strings."""
        named = dict(self.types)
        wanted = ["number" if kind == "integer" else kind for kind in sorted(kinds or named.keys() - {"string"})]
        return list(dict.fromkeys(named.get(kind, named.get("")) or "" for kind in wanted))

    def _value(self, source: Source, key: str) -> Generator[None, None, str]:
        """Return the text up to the parameter's end. Nested elements of the same name are skipped."""
        begin, end = key.join(self.parameter), self.end_of(key).strip()
        value, ended = (yield from before(source, end)), 0
        left, right = self.quotes
        while (self.item and value.count(begin) > ended) or (
            left and value.startswith(left) and not value.endswith(right)
        ):
            ended += 1
            value += end + (yield from before(source, end))
        return value[len(left) : len(value) - len(right)] if left and value.startswith(left) else value

    def _tree(self, text: str, schema: Any, path: tuple[str | None, ...]) -> Any:
        """Return the value of a text that may consist of elements."""
        kinds = kinds_at(schema, path)
        try:
            children = list(self._children(text))
        except ValueError:
            children = []
        if not children:
            if not text.strip() and kinds and "string" not in kinds:
                return [] if "array" in kinds else {} if "object" in kinds else None
            return json.loads(typed(text, kinds or None))
        if all(key == self.item for key, _ in children) and (not kinds or "array" in kinds):
            return [self._tree(inner, schema, (*path, None)) for _, inner in children]
        return {key: self._tree(inner, schema, (*path, key)) for key, inner in children}

    def _children(self, text: str) -> Generator[tuple[str, str], None, None]:
        """Yield the name and text of each element in `text`. Raises ValueError if it contains anything else."""
        while text := text.lstrip():
            if not text.startswith(self.parameter[0]):
                raise ValueError("is text")
            key, _, text = text.removeprefix(self.parameter[0]).partition(self.parameter[1])
            begin, end = key.join(self.parameter), self.end_of(key)
            at = text.index(end)
            while text.count(begin, 0, at) > text.count(end, 0, at):
                at = text.index(end, at + 1)
            yield key, text[:at]
            text = text[at + len(end) :]


def glm_call(source: Source, writer: Writer, schemas: Schemas) -> Generator[None, None, None]:
    """Read `name<arg_key>key</arg_key><arg_value>value</arg_value>…`."""
    head: list[str] = []
    mark = yield from source.until(("<arg_key>", "</tool_call>"), head.append)
    name = "".join(head).strip()
    if mark is None or not name:
        raise Malformed
    kinds = property_kinds(schemas.get(name))
    writer.begin_call(name)
    separator = "{"
    another = mark == "<arg_key>"
    while another:
        key = yield from before(source, "</arg_key>")
        yield from source.expect("<arg_value>")
        value = yield from before(source, "</arg_value>")
        writer.arguments(f"{separator}{json_text(key)}: {typed(value, kinds.get(key))}")
        separator = ", "
        yield from source.spaces()
        another = yield from source.literal("<arg_key>")
    writer.arguments("}" if separator == ", " else "{}")
