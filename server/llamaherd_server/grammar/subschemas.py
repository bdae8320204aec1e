"""Resolves references in JSON schemas and normalizes combinations of allOf, anyOf, oneOf and sibling keywords."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from decimal import Decimal
from itertools import zip_longest
from math import gcd
from typing import Any, NoReturn
from urllib.parse import unquote

Schema = dict[str, Any]

MAX_NODES = 10_000
KINDS = ("object", "array", "string", "integer", "number", "boolean", "null")
COMBINING = ("$ref", "allOf", "anyOf", "oneOf")
# The keywords that can be enforced, by the type that they apply to.
ASSERTIONS: dict[str, tuple[str, ...]] = {
    "object": (
        *("properties", "required", "additionalProperties", "patternProperties", "propertyNames"),
        *("minProperties", "maxProperties"),
    ),
    "array": ("items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems"),
    "string": ("pattern", "format", "minLength", "maxLength", "contentEncoding"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
# Keywords that constrain values in ways that a grammar cannot enforce.
UNENFORCEABLE = frozenset(
    (
        *("if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies"),
        *("contains", "minContains", "maxContains", "$dynamicRef", "$recursiveRef"),
    )
)
_KNOWN = frozenset((*(word for words in ASSERTIONS.values() for word in words), "type", "enum", "const", "not"))
_ADDITIVE = ("pattern", "format", "contentEncoding", "not")  # combined by keeping all of them


class Refused(Exception):
    """The schema cannot be enforced. The message names the location and the reason."""


def refuse(where: str, problem: str) -> NoReturn:
    raise Refused(f"at {where} {problem}" if where else problem)


class Subschemas:
    """Resolves the parts of one schema. Rejects schemas with more than MAX_NODES visited parts."""

    def __init__(self, root: Any, cannot: Callable[[str, str], None]) -> None:
        """`cannot(where, problem)` is called for each keyword that is not enforced."""
        self._root = root
        self._cannot = cannot
        self._nodes = 0
        self._open: set[str] = set()

    def visit(self) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            refuse("", f"has more than {MAX_NODES} parts after resolving references: simplify it")

    def find(self, target: Any, where: str) -> Any:
        """Return the schema that a reference points to."""
        if not isinstance(target, str) or not (target == "#" or target.startswith("#/")):
            refuse(where, f"is {target!r}: only references within the schema (#/$defs/name) are followed")
        found = self._root
        for part in map(_unescaped, target.split("/")[1:]):
            if isinstance(found, dict) and part in found:
                found = found[part]
            elif isinstance(found, list) and part.isdecimal() and len(part) < 10 and int(part) < len(found):
                found = found[int(part)]
            else:
                refuse(where, f"is {target!r}, which is not in the schema")
        return found

    def own(self, schema: Any, where: str) -> Any:
        """Return `schema` with known keywords only: True, False, or an object."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            refuse(where, "must be an object")
        for word in UNENFORCEABLE & schema.keys():
            self._cannot(where, f"has the keyword {word!r}, which cannot be enforced")
        known = {word: value for word, value in schema.items() if word in _KNOWN or word in COMBINING}
        if schema.get("nullable") is True:  # OpenAPI 3.0
            return _nullable(known)
        return known

    def flat(self, schema: Any, where: str) -> list[Schema]:
        """Return schemas without combining keywords; a value satisfies `schema` if it satisfies one of them."""
        self.visit()
        schema = self.own(schema, where)
        if isinstance(schema, bool):
            return [{}] if schema else []
        conjuncts = [[_simple({word: value for word, value in schema.items() if word not in COMBINING}, where)]]
        if "$ref" in schema:
            target = schema["$ref"]
            found = self.find(target, where)
            if target in self._open:  # a direct self-reference allows no further values
                return []
            self._open.add(target)
            conjuncts.append(self.flat(found, target))
            self._open.discard(target)
        for position, one in enumerate(_listed(schema, "allOf", where)):
            conjuncts.append(self.flat(one, f"{where}/allOf/{position}"))
        for word in ("anyOf", "oneOf"):
            if word in schema:
                options = enumerate(_listed(schema, word, where))
                parts = (self.flat(one, f"{where}/{word}/{position}") for position, one in options)
                conjuncts.append([option for part in parts for option in part])
        while len(conjuncts) > 1:  # pairwise, because each merge copies the merged schemas
            pairs = zip_longest(conjuncts[::2], conjuncts[1::2])
            conjuncts = [one if other is None else self._meets(one, other, where) for one, other in pairs]
        return conjuncts[0]

    def _meets(self, some: list[Schema], others: list[Schema], where: str) -> list[Schema]:
        met = []
        for one in some:
            for other in others:
                self.visit()
                if (both := _meet(one, other, where)) is not None:
                    met.append(both)
        return met


def _unescaped(part: str) -> str:
    return unquote(part).replace("~1", "/").replace("~0", "~")


def _listed(schema: Schema, word: str, where: str) -> list[Any]:
    schemas = schema.get(word, [])
    if not isinstance(schemas, list) or (word in schema and not schemas):
        refuse(f"{where}/{word}", "must be a non-empty list")
    return schemas


def _nullable(schema: Schema) -> Schema:
    if "enum" in schema or "const" in schema:  # null must be in the enum as well
        types = schema.get("type")
        return {**schema, "type": [types, "null"]} if isinstance(types, str) else schema
    return {"anyOf": [schema, {"type": "null"}]}


def _simple(schema: Schema, where: str) -> Schema:
    """Normalize a schema for _meet: types, values and the keywords in _ADDITIVE become lists, old drafts current."""
    result = dict(schema)
    if "type" in result:
        types = result["type"] if isinstance(result["type"], list) else [result["type"]]
        for kind in types:
            if not isinstance(kind, str) or kind not in KINDS:
                refuse(where, f"has the type {kind!r}: it must be one of {', '.join(KINDS)}")
        result["type"] = types
    if "enum" in result and not isinstance(result["enum"], list):
        refuse(where, "has enum that is not a list")
    if "const" in result:
        const = result.pop("const")
        listed = map(json_text, result.get("enum", [const]))
        result["enum"] = [const] if json_text(const) in listed else []
    for word in _ADDITIVE:
        if word in result:
            result[word] = [result[word]]
    if isinstance(result.get("items"), list):  # before draft 2020-12
        result["prefixItems"] = result.pop("items")
        if "additionalItems" in result:
            result["items"] = result["additionalItems"]
    result.pop("additionalItems", None)
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(result.get(exclusive), bool) and result.pop(exclusive) and bound in result:  # before draft 6
            result[exclusive] = result.pop(bound)
    return result


def _meet(a: Schema, b: Schema, where: str) -> Schema | None:
    """Return the schema that values satisfying both `a` and `b` satisfy; None: no value satisfies both."""
    if not a or not b:
        return a or b
    result = {**a, **b}
    for word in a.keys() & b.keys():
        one, other = a[word], b[word]
        if word == "type":
            result[word] = [kind for kind in one if kind in other or (kind == "integer" and "number" in other)]
            result[word] += [kind for kind in other if kind == "integer" and "number" in one and "integer" not in one]
            if not result[word]:
                return None
        elif word == "enum":
            texts = set(map(json_text, other))
            result[word] = [value for value in one if json_text(value) in texts]
        elif word in _ADDITIVE:
            result[word] = [*one, *other]
        elif word in ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"):
            result[word] = max(number(a, word, where), number(b, word, where))
        elif word in ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"):
            result[word] = min(number(a, word, where), number(b, word, where))
        elif word == "multipleOf":
            result[word] = _common_multiple(number(a, word, where), number(b, word, where))
        elif word == "uniqueItems":
            result[word] = one or other
        elif word == "required":
            result[word] = list(dict.fromkeys((*names(a, where), *names(b, where))))
        elif word in ("propertyNames", "patternProperties"):
            result[word] = _each(one, other) if word == "patternProperties" else {"allOf": [one, other]}
    _meet_properties(a, b, result, where)
    _meet_items(a, b, result)
    return result


def _meet_properties(a: Schema, b: Schema, result: Schema, where: str) -> None:
    if not any(word in schema for schema in (a, b) for word in ("properties", "additionalProperties")):
        return
    required = set(names(result, where))
    mine, theirs = properties(a, where), properties(b, where)
    met = {}
    for name in {**mine, **theirs}:
        parts = [schema[name] for schema in (mine, theirs) if name in schema]
        for other, listed in ((a, mine), (b, theirs)):
            # Two closed objects would allow nothing together, but one is usually meant to extend the other.
            if name not in listed and "additionalProperties" in other:
                parts.append(other["additionalProperties"])
        if parts[-1] is False and len(parts) > 1 and name in required:
            parts.pop()
        met[name] = parts[0] if len(parts) == 1 else {"allOf": parts}
    if met:
        result["properties"] = met
    extra = [schema["additionalProperties"] for schema in (a, b) if "additionalProperties" in schema]
    if extra:
        result["additionalProperties"] = False if False in extra else extra[0] if len(extra) == 1 else {"allOf": extra}


def _meet_items(a: Schema, b: Schema, result: Schema) -> None:
    lists = [schema.get("prefixItems", []) for schema in (a, b)]
    if not all(isinstance(one, list) for one in lists):
        return
    rests = [[schema["items"]] if "items" in schema else [] for schema in (a, b)]
    if any(lists):
        result["prefixItems"] = []
        for at in range(max(map(len, lists))):
            parts = [part for one, rest in zip(lists, rests, strict=True) for part in one[at : at + 1] or rest]
            result["prefixItems"].append({"allOf": parts})
    if all(rests):
        result["items"] = {"allOf": [*rests[0], *rests[1]]}


def _each(one: Any, other: Any) -> Any:
    if not isinstance(one, dict) or not isinstance(other, dict):
        return one
    return {**one, **{key: {"allOf": [one[key], value]} if key in one else value for key, value in other.items()}}


def _common_multiple(one: Decimal, other: Decimal) -> Decimal:
    scale = max(0, *(-int(value.as_tuple().exponent) for value in (one, other)))
    a, b = int(one.scaleb(scale)), int(other.scaleb(scale))
    return Decimal(a // gcd(a, b) * b).scaleb(-scale) if a and b else Decimal(0)


def number(schema: Schema, word: str, where: str) -> Decimal:
    """Return a keyword's value. Rejects everything but finite numbers."""
    value = schema[word]
    if isinstance(value, Decimal):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or value - value != 0:
        refuse(where, f"has {word} {value!r}: it must be a number")
    return Decimal(str(value))


def names(schema: Schema, where: str) -> Iterable[str]:
    """Return the names of the required properties."""
    required = schema.get("required", [])
    if isinstance(required, bool):  # before draft 4, a flag of a property
        return []
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        refuse(where, "has required that is not a list of names")
    return required


def properties(schema: Schema, where: str, word: str = "properties") -> dict[str, Any]:
    """Return a keyword whose value is an object of schemas."""
    found = schema.get(word, {})
    if not isinstance(found, dict):
        refuse(where, f"has {word} that is not an object")
    return found


def json_text(value: Any) -> str:
    """Return a value as JSON. Raises ValueError for NaN and infinities."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def is_of(value: Any, kind: str) -> bool:
    """Return whether a JSON value is of the type `kind`."""
    if isinstance(value, bool):
        return kind == "boolean"
    if isinstance(value, int | float):
        return kind == "number" or (kind == "integer" and value == value // 1)
    of = {dict: "object", list: "array", str: "string", type(None): "null"}
    return of[type(value)] == kind


def property_kinds(schema: Any) -> dict[str, frozenset[str]]:
    """Return the types that each of an object's properties may have, as far as its schema can be resolved."""
    parts = Subschemas(schema, lambda _where, _problem: None)
    kinds: dict[str, frozenset[str]] = {}
    with suppress(Refused, RecursionError, ValueError):
        for one in parts.flat(schema, "")[:1]:
            for name, of_name in properties(one, "").items():
                kinds[name] = frozenset(kind for part in parts.flat(of_name, "") for kind in _kinds(part))
    return kinds


def kinds_at(schema: Any, path: Iterable[str | None]) -> frozenset[str]:
    """Return the types of the value at `path` (property names, None for items); empty: unknown."""
    parts = Subschemas(schema, lambda _where, _problem: None)
    found = [schema]
    with suppress(Refused, RecursionError, ValueError):
        for step in path:
            flat = [one for part in found for one in parts.flat(part, "")]
            inner = [one.get("items") if step is None else properties(one, "").get(step) for one in flat]
            found = [one for one in inner if one is not None]
        return frozenset(kind for part in found for one in parts.flat(part, "") for kind in _kinds(one))
    return frozenset()


def _kinds(schema: Schema) -> list[str]:
    if "type" in schema:
        return list(schema["type"])
    if "enum" in schema:
        return [kind for kind in KINDS if any(is_of(value, kind) for value in schema["enum"])]
    return [kind for kind, words in ASSERTIONS.items() if schema.keys() & set(words)]
