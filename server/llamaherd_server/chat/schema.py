"""A JSON schema as a GBNF grammar, so that the output is valid by construction.

Fails closed: what the grammar cannot enforce is an error, never output that merely looks right. The grammar may allow
less than the schema does: objects are closed, properties keep the schema's order, numbers are of bounded length.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NoReturn

from llamaherd_server.chat.gbnf import FORMATS, LARGEST, PRIMITIVES, constant, integers, numbers
from llamaherd_server.chat.pattern import pattern_rule
from llamaherd_server.errors import ApiError

MAX_NODES = 4096
MAX_REPEAT = 2000  # llama.cpp's own limit
_ANNOTATIONS = (
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
    *("$comment", "$schema", "$id", "$defs", "definitions"),
)
_KEYWORDS: dict[str, tuple[str, ...]] = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("pattern", "format", "minLength", "maxLength"),
    "integer": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "number": ("minimum", "maximum"),
    "boolean": (),
    "null": (),
}


def schema_rules(schema: Any, param: str, name: str = "root") -> dict[str, str]:
    """The rules of `schema`, besides those of JSON (PRIMITIVES); the one to begin with is `name`.

    Raises the 400 that names the place and the keyword. `param`: the request's field.
    """
    converter = _Converter(schema, name)
    try:
        converter.rules[name] = converter.convert(schema, "")
    except RecursionError:
        raise ApiError(400, f"{param}: the schema is nested too deeply", param=param, code="invalid_schema") from None
    except _Refused as refused:
        raise ApiError(400, f"{param}: the schema {refused}", param=param, code="invalid_schema") from None
    return converter.rules


def grammar_of(rules: dict[str, str]) -> str:
    """The text of a grammar that may use JSON's rules."""
    grammar = "\n".join(f"{name} ::= {rule}" for name, rule in {**PRIMITIVES, **rules}.items())
    grammar.encode()  # half of a surrogate pair is a UnicodeEncodeError here, and a 400, rather than in the engine
    return grammar


def schema_grammar(schema: Any, param: str) -> str:
    """The grammar of `schema`; raises as `schema_rules` does."""
    return grammar_of(schema_rules(schema, param))


class _Refused(Exception):
    """A schema that cannot be enforced; the message says where and why."""


def _refuse(where: str, problem: str) -> NoReturn:
    raise _Refused(f"at {where} {problem}" if where else problem)


def _only(rules: Iterable[str], allowed: Collection[str], where: str) -> None:
    for name in rules:
        if name not in allowed:
            _refuse(where, f"has the keyword {name!r}, which cannot be enforced here: remove it")


class _Converter:
    """Walks a schema; what is used more than once becomes a rule of its own."""

    def __init__(self, root: Any, name: str) -> None:
        self.rules: dict[str, str] = {}
        self._root = root
        self._name = name
        self._nodes = 0
        self._references: dict[str, str] = {}

    def convert(self, schema: Any, where: str) -> str:
        """The right-hand side of a rule for `schema`."""
        self._nodes += 1
        if self._nodes > MAX_NODES:
            _refuse("", f"has more than {MAX_NODES} parts")
        if schema is True:
            return "value"
        if not isinstance(schema, dict):
            _refuse(where, "must be an object")
        rules = {name: value for name, value in schema.items() if name not in _ANNOTATIONS}
        for decisive, convert in (
            ("$ref", self._reference),
            ("anyOf", self._alternatives),
            ("oneOf", self._alternatives),
            ("allOf", self._single),
            ("enum", self._constants),
            ("const", self._constant),
        ):
            if decisive in rules:
                _only(rules, (decisive, "type") if decisive in ("enum", "const") else (decisive,), where)
                return convert(rules[decisive], f"{where}/{decisive}")
        return self._typed(rules, where)

    def _named(self, rule: str) -> str:
        name = f"{self._name}-{len(self.rules)}"
        self.rules[name] = rule
        return name

    def _reference(self, target: Any, where: str) -> str:
        if not isinstance(target, str) or not (target == "#" or target.startswith("#/")):
            _refuse(where, f"is {target!r}: only references within the schema (#/$defs/name) are followed")
        if target not in self._references:
            found = self._root
            for part in target.split("/")[1:]:
                if not isinstance(found, dict) or part not in found:
                    _refuse(where, f"is {target!r}, which is not in the schema")
                found = found[part]
            name = self._references[target] = self._named("")  # before its rule, which may refer to it
            self.rules[name] = self.convert(found, target)
        return self._references[target]

    def _alternatives(self, schemas: Any, where: str) -> str:
        if not isinstance(schemas, list) or not schemas:
            _refuse(where, "must be a list with something in it")
        return " | ".join(f"({self.convert(one, f'{where}/{i}')})" for i, one in enumerate(schemas))

    def _single(self, schemas: Any, where: str) -> str:
        if not isinstance(schemas, list) or len(schemas) != 1:
            _refuse(where, "must have one element: others cannot be enforced together")
        return self.convert(schemas[0], f"{where}/0")

    def _constants(self, values: Any, where: str) -> str:
        if not isinstance(values, list) or not values:
            _refuse(where, "must be a list with something in it")
        return " | ".join(self._constant(value, where) for value in values)

    def _constant(self, value: Any, where: str) -> str:
        try:
            return constant(value)
        except ValueError:
            _refuse(where, "has a number that JSON has no form for")

    def _typed(self, rules: dict[str, Any], where: str) -> str:
        kinds = rules.pop("type", None)
        if kinds is None and not rules:
            return "value"
        if kinds is None:
            kinds = [kind for kind, words in _KEYWORDS.items() if rules.keys() & set(words)][:1]
        elif not isinstance(kinds, list):
            kinds = [kinds]
        for kind in kinds:
            if not isinstance(kind, str) or kind not in _KEYWORDS:
                _refuse(where, f"has the type {kind!r}: it must be one of {', '.join(_KEYWORDS)}")
        _only(rules, [word for kind in kinds for word in _KEYWORDS[kind]], where)
        of_kind = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
            "integer": self._integer,
            "number": self._number,
        }
        return " | ".join(
            of_kind[kind]({name: rules[name] for name in rules if name in _KEYWORDS[kind]}, where)
            if kind in of_kind
            else kind
            for kind in kinds
        )

    def _object(self, rules: dict[str, Any], where: str) -> str:
        properties = rules.get("properties", {})
        required = rules.get("required", [])
        if not isinstance(properties, dict):
            _refuse(where, "has properties that are no object")
        if not isinstance(required, list) or not all(isinstance(name, str) and name in properties for name in required):
            _refuse(where, "has required that is not a list of names in its properties")
        if not properties:
            additional = rules.get("additionalProperties", True)
            if additional is False:
                return '"{" space "}"'
            value = self._named(self.convert(additional, f"{where}/additionalProperties"))
            pair = self._named(f'string space ":" space {value} space')
            return f'"{{" space ({pair} ("," space {pair})*)? "}}"'
        first = rest = '""'  # what may follow when no property, or some, came before; built from the last one on
        for name, schema in reversed(properties.items()):
            value = self._named(self.convert(schema, f"{where}/properties/{name}"))
            pair = f'{constant(name)} space ":" space {value} space'
            if name in required:
                first, rest = f"{pair} {rest}", self._named(f'"," space {pair} {rest}')
            else:
                first = self._named(f"{pair} {rest} | {first}")
                rest = self._named(f'("," space {pair})? {rest}')
        return f'"{{" space {first} "}}"'

    def _array(self, rules: dict[str, Any], where: str) -> str:
        if "prefixItems" in rules:
            _only(rules, ("prefixItems",), where)
            schemas = rules["prefixItems"]
            if not isinstance(schemas, list) or not schemas:
                _refuse(where, "has prefixItems that is no list with something in it")
            items = [f"{self._named(self.convert(one, f'{where}/{i}'))} space" for i, one in enumerate(schemas)]
            separated = ' "," space '.join(items)
            return f'"[" space {separated} "]"'
        low, high = _lengths(rules, "minItems", "maxItems", where)
        if high == 0:
            return '"[" space "]"'
        item = self._named(f"({self.convert(rules.get('items', True), f'{where}/items')}) space")
        more = f"{{{max(0, low - 1)},{'' if high is None else high - 1}}}"
        items_rule = f'{item} ("," space {item}){more}'
        return f'"[" space {items_rule if low else f"({items_rule})?"} "]"'

    def _string(self, rules: dict[str, Any], where: str) -> str:
        if "pattern" in rules:
            _only(rules, ("pattern",), where)
            try:
                return rf'"\"" {pattern_rule(rules["pattern"])} "\""'
            except ValueError as error:
                _refuse(where, f"has a pattern that {error}")
        if "format" in rules:
            _only(rules, ("format",), where)
            if rules["format"] not in tuple(FORMATS):
                _refuse(where, f"has the format {rules['format']!r}: only {', '.join(FORMATS)} can be enforced")
            return rf'"\"" {FORMATS[rules["format"]]} "\""'
        low, high = _lengths(rules, "minLength", "maxLength", where)
        return rf'"\"" char{{{low},{"" if high is None else high}}} "\""' if rules else "string"

    def _integer(self, rules: dict[str, Any], where: str) -> str:
        low, high = _bounds(rules, where)
        return integers(low, high) if rules else "integer"

    def _number(self, rules: dict[str, Any], where: str) -> str:
        low, high = _bounds(rules, where)
        return numbers(low, high) if rules else "number"


def _lengths(rules: dict[str, Any], least: str, most: str, where: str) -> tuple[int, int | None]:
    for name in (least, most):
        if name in rules and (type(rules[name]) is not int or not 0 <= rules[name] <= MAX_REPEAT):
            _refuse(where, f"has {name} {rules[name]!r}: it must be a whole number from 0 to {MAX_REPEAT}")
    low, high = rules.get(least, 0), rules.get(most)
    if high is not None and low > high:
        _refuse(where, f"has {least} above {most}")
    return low, high


def _bounds(rules: dict[str, Any], where: str) -> tuple[int, int]:
    for name, value in rules.items():
        whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
        if not whole or abs(value) > LARGEST:
            _refuse(where, f"has {name} {value!r}: only whole numbers of up to 15 digits can be enforced")
    low = max(int(rules.get("minimum", -LARGEST)), int(rules.get("exclusiveMinimum", -LARGEST - 1)) + 1)
    high = min(int(rules.get("maximum", LARGEST)), int(rules.get("exclusiveMaximum", LARGEST + 1)) - 1)
    if low > high:
        _refuse(where, "has a minimum above its maximum")
    return low, high
