"""JSON schemas as grammars, judged by llama.cpp's own grammar sampler: what it lets through and what it does not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from llamaherd_server.chat.schema import schema_grammar
from llamaherd_server.errors import ApiError

Accepts = Callable[[Any, str], bool]


@pytest.fixture(scope="module")
def accepts(lets: Callable[[str, str], bool]) -> Accepts:
    """accepts(schema, text): whether the schema's grammar lets the model write exactly `text`."""
    return lambda schema, text: lets(schema_grammar(schema, "schema"), text)


PERSON = {
    "title": "Person",
    "type": "object",
    "properties": {
        "name": {"type": "string", "description": "in full"},
        "age": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 130}, {"type": "null"}], "default": None},
        "tags": {"type": "array", "items": {"enum": ["a", 'b\n"c"']}, "maxItems": 2},
    },
    "required": ["name"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}
    },
    "$ref": "#/$defs/node",
}
LIST = {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}
PAIR = {"prefixItems": [{"type": "string"}, {"type": "number"}]}
OPTIONAL = {"properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}}, "required": ["b"]}


@pytest.mark.parametrize(
    ("schema", "yes", "no"),
    [
        (True, ['{"a": [1, "x", null]}', "-1.5e3", '"\\u00e9é"'], ["{", "01", '"\n"', "nul", '"\\ud800"']),
        ({"type": "object"}, ["{}", '{"a": {}}'], ["[]", "1"]),
        (PERSON, ['{"name": "Jo"}', '{"name": "Jo", "age": 130, "tags": ["a", "b\\n\\"c\\""]}'], ["{}"]),
        (PERSON, ['{"name":"", "age": null}'], ['{"name": "Jo", "age": 131}', '{"name": 1}', '{"name": "", "x": 1}']),
        (TREE, ['{"next": {"next": null}}', "{}"], ['{"next": {"next": 1}}', '{"next": {}']),
        (LIST, ["[true, false]", "[true,true,true]"], ["[true]", "[]", "[true, true, true, true]"]),
        ({"type": "array", "maxItems": 0}, ["[]"], ["[1]"]),
        ({"type": "array", "items": {"type": "integer"}}, ["[]", "[1, 2]"], ["[1.5]"]),
        (PAIR, ['["a", 1.5]'], ['["a"]', '[1, "a"]']),
        (
            OPTIONAL,
            ['{"b": 2}', '{"a": 1, "b": 2, "c": 3}', '{"b": 2, "c": 3}'],
            ['{"a": 1}', "{}", '{"b": 2, "a": 1}'],
        ),
        ({"additionalProperties": {"type": "integer"}}, ["{}", '{"a": 1, "b": 2}'], ['{"a": "x"}']),
        ({"additionalProperties": False}, ["{}"], ['{"a": 1}']),
        ({"type": ["string", "null"], "maxLength": 2}, ["null", '"ab"', '"\\u00e9é"'], ['"abc"', "1"]),
        ({"type": "string", "minLength": 2}, ['"ab"'], ['"a"']),
        ({"const": {"a": [1, None]}}, ['{"a": [1, null]}'], ['{"a": [1]}']),
        ({"type": "string", "format": "date"}, ['"2026-11-22"'], ['"2026-13-22"', '"today"']),
        ({"type": "string", "format": "date-time"}, ['"2026-11-22T10:00:00.5+01:00"'], ['"2026-11-22"']),
        ({"allOf": [{"type": "boolean"}]}, ["true"], ["null"]),
    ],
)
def test_what_a_schema_lets_through(accepts: Accepts, schema: Any, yes: list[str], no: list[str]) -> None:
    assert [text for text in yes if not accepts(schema, text)] == []
    assert [text for text in no if accepts(schema, text)] == []


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        (r"^[a-z]{2,3}$", ["ab", "abc"], ["a", "abcd", "aB"]),
        (r"^\d+(\.\d+)?$", ["1", "1.5"], ["", "1.", "x"]),
        (r"^(yes|no|)$", ["yes", "no", ""], ["maybe"]),
        (r"^[^\"\\]*$", ["é x"], ['"', "\\"]),
        (r"^\S\"\\$", ['a"\\'], [' "\\']),
        (r"^a.c$", ["abc", 'a"c'], ["a\nc", "ac"]),
        (r"b\b|b", [], []),
        (r"@", ["a@b", "@"], ["ab"]),
    ],
)
def test_what_a_pattern_lets_through(accepts: Accepts, pattern: str, yes: list[str], no: list[str]) -> None:
    schema = {"type": "string", "pattern": pattern}
    if "\\b" in pattern:
        with pytest.raises(ApiError, match="cannot be enforced"):
            schema_grammar(schema, "schema")
    assert [text for text in yes if not accepts(schema, json.dumps(text, ensure_ascii=False))] == []
    assert [text for text in no if accepts(schema, json.dumps(text, ensure_ascii=False))] == []


@pytest.mark.parametrize(
    ("low", "high"), [(0, 9), (0, 255), (7, 1234), (-5, 5), (-120, -13), (100, 100), (99, 101), (-1, 0), (990, 2001)]
)
def test_integers_within_bounds(accepts: Accepts, low: int, high: int) -> None:
    schema = {"type": "integer", "minimum": low, "exclusiveMaximum": high + 1}
    near = {low - 1, low, low + 1, 0, high - 1, high, high + 1, (low + high) // 2, 10 * high, -low}
    assert {value for value in near if accepts(schema, str(value))} == {value for value in near if low <= value <= high}


def test_numbers_within_bounds(accepts: Accepts) -> None:
    schema = {"type": "number", "minimum": -2, "maximum": 1}
    assert all(accepts(schema, text) for text in ("0.5", "1", "1.0", "-1.99", "-2", "0"))
    assert not any(accepts(schema, text) for text in ("1.1", "-2.1", "2", "10", "0.5e9"))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "strin"}, "has the type 'strin'"),
        ({"type": "object", "minProperties": 1}, "keyword 'minProperties'"),
        ({"properties": {"a": {"type": "number", "multipleOf": 2}}}, "at /properties/a has the keyword 'multipleOf'"),
        ({"not": {}}, "keyword 'not'"),
        ({"$ref": "https://example.org/s"}, "only references within the schema"),
        ({"$ref": "#/$defs/missing"}, "which is not in the schema"),
        ({"anyOf": []}, "with something in it"),
        ({"allOf": [{}, {}]}, "one element"),
        ({"required": ["a"]}, "names in its properties"),
        ({"required": [["a"]]}, "names in its properties"),
        ({"type": "string", "pattern": "(?=a)"}, "cannot be enforced"),
        ({"type": "string", "pattern": "("}, "not a regular expression"),
        ({"type": "string", "pattern": 1}, "is no text"),
        ({"type": "string", "format": "email"}, "only date, time, date-time, uuid"),
        ({"type": "string", "minLength": 10**9}, "whole number from 0 to 2000"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "minimum above its maximum"),
        ({"type": "number", "maximum": 0.5}, "only whole numbers"),
        ({"const": math.inf}, "JSON has no form for"),
        ({"anyOf": [{}] * 5000}, "more than 4096 parts"),
        (1, "must be an object"),
    ],
)
def test_what_cannot_be_enforced_is_refused(schema: Any, message: str) -> None:
    with pytest.raises(ApiError, match=message) as refused:
        schema_grammar(schema, "response_format")
    assert (refused.value.status_code, refused.value.param) == (400, "response_format")


def test_a_schema_nested_too_deeply_is_refused() -> None:
    schema: Any = {}
    for _ in range(2000):
        schema = {"anyOf": [schema]}
    with pytest.raises(ApiError, match="nested too deeply"):
        schema_grammar(schema, "response_format")
