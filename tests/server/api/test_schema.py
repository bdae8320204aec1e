"""JSON schemas as grammars, judged by llama.cpp's own grammar sampler: what it lets through and what it does not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator, Draft202012Validator  # type: ignore[import-untyped]

from llamaherd_server.errors import ApiError
from llamaherd_server.grammar.schema import schema_grammar

from .gbnf_texts import Texts

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
REFERRING_ITSELF = {
    "$ref": "#/$defs/a",
    "$defs": {
        "a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}, {"type": "array", "items": {"$ref": "#/$defs/a"}}]}
    },
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
        (REFERRING_ITSELF, ["null", "[null]"], ["1"]),
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
        (r"(?i)^[a-c]k$", ["ak", "BK"], ["dk"]),
        (r"(?s)^a.c$", ["a\nc"], ["ac"]),
        (r"^(?P<year>\d{4})-(?<month>\d\d)\z", ["2026-11"], ["2026-1"]),
        (r"^(?=.*\d)(?!0)\w{,3}?$", ["1", "a0b"], ["0", "abc", "1234"]),
        (r"^[\P{Lu}\cA-\x03][\d-x\]]$", ["a-", "\x02x", "11", "a]"], ["Aa", "aw"]),
        (r"^(?:\ud83d\ude00|\u{1F601}|\u00e9)$", ["😀", "😁", "é"], ["a"]),
        (r"^[^][a]|^[][a]|^b{,}]$", ["xa", "b{,}]"], ["a", "b]"]),
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


NESTED = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
REFERRING = {
    "$defs": {"a/b": {"type": "integer"}, "list": {"anyOf": [{"$ref": "#/$defs/list"}, {"type": "null"}]}},
    "properties": {
        "pair": {"prefixItems": [{"type": "boolean"}, {"$ref": "#/properties/pair/prefixItems/0"}], "minItems": 2},
        "slash": {"$ref": "#/$defs/a~1b"},
        "list": {"$ref": "#/$defs/list", "description": "refers to itself"},
    },
}
CHOICE = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
}
WORDS = [f"word-{number}" for number in range(5000)]


@pytest.mark.parametrize(
    ("schema", "yes", "no"),
    [
        ({"type": "string", "enum": ["a", None, 7]}, ['"a"'], ["7", "null"]),
        ({"enum": ["a", None, 7]}, ['"a"', "7", "null"], ['"7"']),
        ({"enum": WORDS}, ['"word-0"', '"word-4999"', '"word-10"'], ['"word-5000"', '"word-"']),
        ({"enum": ["", "a", "aa", "ab", {"k": [1, "x"]}]}, ['""', '"a"', '"ab"', '{"k": [1, "x"]}'], ['"b"']),
        ({"type": "string", "enum": ["aa", "b"], "maxLength": 1}, ['"b"'], ['"aa"']),
        ({"type": "integer", "enum": [1, 5, 9], "minimum": 5}, ["5", "9"], ["1"]),
        ({"type": "string", "nullable": True}, ["null", '"a"'], ["1"]),
        ({"$ref": "#/$defs/x", "nullable": True, "$defs": {"x": {"type": "integer"}}}, ["null", "1"], ['"a"']),
        (REFERRING, ['{"pair": [true, false], "slash": 3, "list": null}'], ['{"pair": [true, 1]}', '{"list": 1}']),
        (CHOICE, ['{"a": 1}', '{"b": 1}', '{"a": 1, "b": 2}'], ["{}"]),
        ({"allOf": [NESTED, {"properties": {"m": {}}}]}, ['{"n": 1, "m": "x"}', '{"n": 1}'], ['{"m": "x"}']),
        ({"allOf": [{"type": ["integer", "string"]}, {"minimum": 3}]}, ["3", '"a"'], ["2"]),
        ({"allOf": [{"pattern": "a"}, {"pattern": "b"}], "type": "string"}, ['"ab"', '"bxa"'], ['"a"']),
        ({"type": "object", "required": ["a"]}, ['{"a": [1]}'], ["{}"]),
        ({**NESTED, "additionalProperties": True}, ['{"n": 1}', '{"n": 1, "x": "y", "nn": 2}'], ['{"n": 1, "n": 2}']),
        ({**NESTED, "minProperties": 1, "x-kind": "m", "discriminator": {}}, ['{"n": 1}'], ["{}"]),
        ({"properties": {"a": {}, "b": {}}, "minProperties": 1}, ['{"a": 1}', '{"b": 1}'], ["{}"]),
        ({"type": "object", "minProperties": 1, "maxProperties": 2}, ['{"a": 1, "b": 2}'], ["{}"]),
        (
            {"patternProperties": {"^a": {"type": "integer"}, "b$": {"type": "null"}}},
            ['{"a": 1, "b": null}'],
            ['{"a": ""}'],
        ),
        ({"properties": {"a": {"not": {}}, "b": {}}}, ['{"b": 1}', "{}"], ['{"a": 1}']),
        ({"not": {"type": "null"}}, ["1", '"a"'], ["null"]),
        ({"type": "string", "not": {"enum": ["a", "b"]}}, ['"c"', '"ab"'], ['"a"']),
        ({"items": [{"type": "integer"}, {"type": "string"}], "additionalItems": False}, ['[1, "a"]'], ["[1, 2]"]),
        ({"items": [{"type": "integer"}], "additionalItems": {"type": "string"}}, ["[1]", '[1, "a", "b"]'], ["[1, 2]"]),
        ({"prefixItems": [{}, {}], "maxItems": 1}, ["[1]"], ["[1, 2]"]),
        (
            {"type": "array", "items": {"type": "null"}, "minItems": 300, "maxItems": 70000},
            [f"[{'null,' * 650}null]"],
            ["[]"],
        ),
        (
            {"type": "string", "minLength": 700, "maxLength": 5000},
            [f'"{"a" * 4999}"', f'"{"a" * 700}"'],
            [f'"{"a" * 699}"'],
        ),
        ({"type": "string", "maxLength": 5000}, ['""', f'"{"a" * 5000}"'], [f'"{"a" * 5001}"']),
        ({"enum": ["x", "y"], "type": "string", "const": "y"}, ['"y"'], ['"x"']),
        (
            {"type": "array", "items": {"enum": ["a", "b", "c"]}, "uniqueItems": True, "minItems": 2},
            ['["a", "c"]'],
            ['["a"]', '["a", "a"]'],
        ),
        ({"type": "array", "uniqueItems": True, "maxItems": 1}, ["[]", "[1]"], ["[1, 1]"]),
        ({"type": "number", "exclusiveMinimum": 0}, ["0.001", "7"], ["0", "0.000", "-1"]),
        (
            {"type": "number", "minimum": -0.5, "exclusiveMaximum": 2.25},
            ["-0.5", "2.249", "0"],
            ["-0.51", "2.25", "2.3"],
        ),
        ({"type": "number", "multipleOf": 0.01, "minimum": 0}, ["1.25", "3", "0.1"], ["1.255", "-1"]),
        ({"type": "integer", "multipleOf": 1000, "minimum": 1000}, ["1000", "42000"], ["0", "1500"]),
        ({"type": "integer", "format": "int32"}, ["2147483647", "-2147483648"], ["2147483648"]),
        ({"type": "integer", "minimum": 10**20}, [str(10**20)], ["5"]),
        (
            {"type": "string", "format": "date"},
            ['"2024-02-29"', '"2000-02-29"'],
            ['"2023-02-29"', '"1900-02-29"', '"1012-02-31"'],
        ),
        ({"type": "string", "format": "duration"}, ['"P1Y2M3DT4H5M6.5S"', '"P3W"'], ['"P"', '"P1DT"', '"3W"']),
        (
            {"type": "string", "format": "uri", "maxLength": 2083},
            ['"https://a.example/b%20c?d=e#f"', '"mailto:a@b.example"'],
            ['"a b"'],
        ),
        (
            {"type": "string", "format": "date-time", "maxLength": 70},
            ['"2024-02-29T23:59:59Z"'],
            ['"2024-02-30T23:59:59Z"'],
        ),
        ({"type": "string", "contentEncoding": "base64"}, ['"YQ=="'], ['"YQ="']),
        ({"type": "string", "pattern": "^(?!^[-+.]*$)[+-]?0*\\d*\\.?\\d*$"}, ['"-1.5"'], ['"-."', '"1e5"']),
    ],
)
def test_what_libraries_write_is_enforced(accepts: Accepts, schema: Any, yes: list[str], no: list[str]) -> None:
    assert [text[:50] for text in yes if not accepts(schema, text)] == []
    assert [text[:50] for text in no if accepts(schema, text)] == []


CORPUS = {
    f"{library}: {name}": case
    for library in ("pydantic", "zod")
    for name, case in json.loads((Path(__file__).parent / "schemas" / f"{library}.json").read_text()).items()
}
# What a grammar cannot know, so that it is a 400 in strict: that no two of any number of values are equal, and so on.
ONLY_LENIENT = {"pydantic: set": "uniqueItems", "pydantic: frozenset": "uniqueItems", "pydantic: pattern-type": "regex"}


@pytest.mark.parametrize("name", CORPUS)
def test_schemas_of_pydantic_and_zod(lets: Callable[[str, str], bool], name: str) -> None:
    case = CORPUS[name]
    if name in ONLY_LENIENT:
        with pytest.raises(ApiError, match=ONLY_LENIENT[name]):
            schema_grammar(case["schema"], "schema")
    grammar = schema_grammar(case["schema"], "schema", strict=name not in ONLY_LENIENT)
    assert [value for value in case["valid"] if not lets(grammar, json.dumps(value, ensure_ascii=False))] == []
    assert [value for value in case["invalid"] if lets(grammar, json.dumps(value, ensure_ascii=False))] == []


@pytest.mark.parametrize("name", [name for name in CORPUS if name not in ONLY_LENIENT])
def test_jsonschema_agrees_with_what_a_grammar_allows(name: str) -> None:
    schema = CORPUS[name]["schema"]
    if "\\p{" in json.dumps(schema) or "draft-04" in schema.get("$schema", ""):
        pytest.skip("jsonschema does not know this")
    texts = Texts(schema_grammar(schema, "schema"), seed=7)
    version = Draft7Validator if "draft-07" in schema.get("$schema", "") else Draft202012Validator
    validator = version(_without_nullable(schema))
    for _ in range(60):
        with suppress(RecursionError):
            value = json.loads(texts.one())
            assert validator.is_valid(value), value


def _without_nullable(schema: Any) -> Any:
    """The schema with OpenAPI's word for it written in JSON Schema's."""
    if isinstance(schema, list):
        return [_without_nullable(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {key: _without_nullable(value) for key, value in schema.items() if key != "nullable"}
    return {"anyOf": [parts, {"type": "null"}]} if schema.get("nullable") is True else parts


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "strin"}, "has the type 'strin'"),
        ({"properties": {"a": {"contains": {}}}}, "at /properties/a has the keyword 'contains'"),
        ({"if": {}, "then": {}}, "keyword '(if|then)'"),
        ({"not": {"type": "object", "required": ["a"]}}, "keyword 'not'"),
        ({"type": "array", "uniqueItems": True}, "keyword 'uniqueItems'"),
        ({"properties": {"a": {}, "b": {}}, "minProperties": 2}, "keyword 'minProperties'"),
        ({"type": "string", "pattern": "(?<=a)b"}, "the pattern '.*', which uses a lookbehind"),
        ({"type": "string", "pattern": r"a\bc"}, "which uses a word boundary"),
        ({"type": "string", "pattern": r"(a)\1"}, "which uses a back reference"),
        ({"type": "string", "not": {"pattern": r"a\bc"}}, "the pattern '.*', which uses a word boundary"),
        ({"type": "string", "pattern": "a(?i)b"}, r"which uses flags other than \(\?i\)"),
        ({"type": "string", "pattern": "x?^a"}, "which uses an anchor after a part that may be empty"),
        ({"type": "string", "pattern": "(^a)*"}, "which repeats an anchor"),
        ({"type": "string", "pattern": r"\p{Script=Latin}"}, r"which uses \\p\{Script=Latin\}, which is not supported"),
        *(
            ({"type": "string", "pattern": pattern}, "is not a regular expression: .* at character")
            for pattern in ("(", ")", "[a", "a**", "[z-a]", "a{3,1}", r"\q", "(?>a)", "\\", r"\u{110000}")
        ),
        ({"type": "string", "pattern": 1}, "must be a string"),
        ({"type": "string", "format": "star-date"}, "has the format 'star-date'"),
        (
            {"type": "string", "format": "hostname", "maxLength": 253},
            "has maxLength 253, which cannot be enforced beside",
        ),
    ],
)
def test_what_cannot_be_enforced_is_refused_in_strict(schema: Any, message: str) -> None:
    with pytest.raises(ApiError, match=message) as refused:
        schema_grammar(schema, "response_format")
    assert (refused.value.status_code, refused.value.param) == (400, "response_format")
    assert schema_grammar(schema, "response_format", strict=False) if "strin'" not in message else True


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$ref": "https://example.org/s"}, "only references within the schema"),
        ({"$ref": "#/$defs/missing"}, "which is not in the schema"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "allows no value at all"),
        ({"anyOf": []}, "must be a non-empty list"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "allows no value at all"),
        ({"required": [["a"]]}, "not a list of names"),
        ({"type": "string", "minLength": 10**9}, "has minLength 1000000000: it must be at most 1000000"),
        ({"type": "array", "minItems": 10**9}, "has minItems 1000000000: it must be at most 1000000"),
        ({"type": "string", "pattern": "^[a-z]{1,90000}$"}, "has pattern, which needs an automaton of more than 4000"),
        ({"type": "string", "pattern": "^(.*a.{9}|b)*$"}, "has pattern, which needs an automaton of more than 4000"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "allows no value at all"),
        ({"type": "integer", "multipleOf": 0}, "must be above 0"),
        ({"type": "integer", "multipleOf": 7919}, "has multipleOf 7919"),
        ({"const": math.inf}, "JSON cannot represent"),
        ({"anyOf": [{}] * 20_000}, "more than 10000 parts"),
        ({"enum": ["x" * 50] * 30_000}, "larger than 1048576 bytes"),
        ({"required": ["a"] * 1_000_000}, "larger than 1048576 bytes"),
        (1, "must be an object"),
    ],
)
def test_what_is_wrong_or_too_large_is_refused(schema: Any, message: str, strict: bool) -> None:
    with pytest.raises(ApiError, match=message) as refused:
        schema_grammar(schema, "response_format", strict=strict)
    assert (refused.value.status_code, refused.value.param) == (400, "response_format")


def test_a_closed_object_has_no_rules_of_other_names(accepts: Accepts) -> None:
    longest = "k" * 100_000
    schema = {"type": "object", "properties": {longest: {"type": "null"}}, "additionalProperties": False}
    assert len(schema_grammar(schema, "schema")) < 2 * len(longest)
    assert accepts({**schema, "properties": {"ka": {}}}, "{}")
    assert not accepts({**schema, "properties": {"ka": {}}}, '{"kb": 1}')


def test_a_schema_nested_too_deeply_is_refused() -> None:
    schema: Any = {}
    for _ in range(2000):
        schema = {"anyOf": [schema]}
    with pytest.raises(ApiError, match="nested too deeply"):
        schema_grammar(schema, "response_format")
