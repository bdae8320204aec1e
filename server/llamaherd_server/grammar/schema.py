"""Converts a JSON schema to a GBNF grammar, so that the output is valid by construction.

The grammar may allow less than the schema: objects without additionalProperties are closed, properties keep their
order, and numbers and white space are bounded in length. If a keyword cannot be enforced, a strict schema is rejected
with a 400; otherwise, the rest of the schema is enforced.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from llamaherd_server.errors import ApiError
from llamaherd_server.grammar.arrays import array_rule
from llamaherd_server.grammar.gbnf import PRIMITIVES, literal, repeated, trie
from llamaherd_server.grammar.language import Term, Terms, TooLarge
from llamaherd_server.grammar.numbers import Bounds, bounds_of
from llamaherd_server.grammar.objects import listed_properties, object_rule
from llamaherd_server.grammar.strings import MAX_LENGTH, Strings, lengths
from llamaherd_server.grammar.subschemas import (
    ASSERTIONS,
    COMBINING,
    KINDS,
    Refused,
    Schema,
    Subschemas,
    is_of,
    json_text,
    names,
    refuse,
)

MAX_SCHEMA_BYTES = MAX_GRAMMAR_BYTES = 2**20


def schema_rules(schema: Any, param: str, name: str = "root", *, strict: bool = True) -> dict[str, str]:
    """Return the rules for `schema`, with the start rule `name`, in addition to those of JSON (PRIMITIVES).

    Raises a 400 that names the location and the keyword. `param`: the request's field. `strict`: a keyword that cannot
    be enforced is an error, too.
    """
    with _refusals(param):
        return Converter(schema, name, strict=strict).whole(schema)


def arguments_rules(schema: Any, param: str, name: str, *, strict: bool) -> dict[str, str]:
    """Like `schema_rules`, but only for objects that satisfy `schema`."""
    with _refusals(param):
        return Converter(schema, name, strict=strict).whole({"allOf": [schema, {"type": "object"}]})


def bare_rules(
    schema: Any, param: str, name: str, *, strict: bool, end: str | None, quote: str = ""
) -> tuple[dict[str, str], list[tuple[str, str, bool]]]:
    """Return rules for an object's properties and, for each property, its name, rule and whether it is required.

    A property that is a string is unescaped text between two `quote`, and does not contain `end`. If `end` is None, it
    is a JSON string, as are all strings within other values. Raises like `schema_rules`.
    """
    with _refusals(param):
        converter = Converter(schema, name, strict=strict, end=end, quote=quote)
        return converter.rules, converter.members({"allOf": [schema, {"type": "object"}]})


@contextmanager
def _refusals(param: str) -> Iterator[None]:
    """Convert every exception that rejects a schema to a 400."""
    try:
        yield
        return
    except RecursionError:
        problem = "is nested too deeply"
    except TooLarge as error:
        problem = str(error)
    except Refused as refused:
        problem = str(refused)
    except ValueError:
        problem = "has a number that JSON cannot represent"
    raise ApiError(400, f"{param}: the schema {problem}", param=param, code="invalid_schema") from None


def grammar_of(rules: dict[str, str]) -> str:
    """Return the text of a grammar from `rules` and JSON's rules."""
    grammar = "\n".join(f"{name} ::= {rule}" for name, rule in {**PRIMITIVES, **rules}.items())
    grammar.encode()  # raise UnicodeEncodeError for unpaired surrogates here, as a 400, and not in the engine
    return grammar


def schema_grammar(schema: Any, param: str, *, strict: bool = True) -> str:
    """Return the grammar for `schema`. Raises like `schema_rules`."""
    return grammar_of(schema_rules(schema, param, strict=strict))


class Converter:
    """Converts a schema. Methods return a rule's name or a literal; None: no value satisfies the schema."""

    def __init__(self, root: Any, name: str, *, strict: bool, end: str | None = None, quote: str = "") -> None:
        """`end`, `quote`: as in `bare_rules`, for strings that are not inside other values."""
        if len(json.dumps(root)) > MAX_SCHEMA_BYTES:
            refuse("", f"is larger than {MAX_SCHEMA_BYTES} bytes: shorten it")
        self.rules: dict[str, str] = {}
        self._name = name
        self._strict = strict
        self._size = 0
        self._shared: dict[str, str] = {}
        self._automata: dict[tuple[Term, bool], str | None] = {}
        self._memo: dict[tuple[str | int, bool], str | None] = {}  # by reference, or by the id of a schema in `_kept`
        self._kept: list[Any] = []
        self._converting: set[tuple[str | int, bool]] = set()  # schemas being converted for the same value
        self.parts = Subschemas(root, self.cannot)
        self.terms = Terms()
        self.strings = Strings(self.terms, self.cannot)
        ended = self.terms.sequence(self.terms.all, self.terms.text(end or ""), self.terms.all)
        self._quote = quote
        self._bare = None if end is None else self.terms.other(ended)  # the texts that strings outside of JSON may have

    def whole(self, schema: Any) -> dict[str, str]:
        """Return the rules for `schema`, with the converter's name as start rule."""
        rule = self.convert(schema, "")
        if rule is None:
            refuse("", "allows no value at all")
        return {**self.rules, self._name: rule}

    def members(self, schema: Any) -> list[tuple[str, str, bool]]:
        """Return the name and rule of each property that `schema` lists, and whether it is required."""
        alternatives = self.parts.flat(schema, "")
        if len(alternatives) > 1:
            self.cannot("", "has alternatives, which cannot be enforced in this model's format")
        members = []
        for one in alternatives[:1]:
            required = set(names(one, ""))
            for name, of_name in listed_properties(self, one, "").items():
                rule = self.convert(of_name, f"/properties/{name}")
                if rule is not None:
                    members.append((name, rule, name in required))
                elif name in required:
                    refuse(f"/properties/{name}", "allows no value at all")
        return members

    def cannot(self, where: str, problem: str) -> None:
        """Reject a keyword that cannot be enforced if the schema is strict."""
        if self._strict:
            refuse(where, f"{problem}: remove it, or leave out strict")

    def share(self, rule: str) -> str:
        """Return the name of a rule with the text `rule`, created on first use."""
        name = self._shared.get(rule)
        if name is None:
            name = self._shared[rule] = self.add(f"{self._name}-{len(self.rules)}", rule)
        return name

    def reserved(self) -> str:
        """Reserve and return the name of a rule to be added later, which may then refer to itself."""
        return self.add(f"{self._name}-{len(self.rules)}", '""')

    def add(self, name: str, rule: str) -> str:
        """Add or replace a rule. Returns its name."""
        self.rules[name] = rule
        self._size += len(name) + len(rule) + 6
        if self._size > MAX_GRAMMAR_BYTES:
            refuse(
                "", f"makes a grammar of more than {MAX_GRAMMAR_BYTES} bytes: shorten it (enum, pattern, properties)"
            )
        return name

    def convert(self, schema: Any, where: str) -> str | None:
        """Return the rule for values that satisfy `schema`."""
        self.parts.visit()
        whole, schema = schema, self.parts.own(schema, where)
        if isinstance(schema, bool):
            return "value" if schema else None
        if schema.keys() == {"$ref"}:
            found = self.parts.find(schema["$ref"], f"{where}/$ref")
            return self._once(schema["$ref"], lambda: self.convert(found, schema["$ref"]))
        if schema.keys() == {"allOf"} and isinstance(schema["allOf"], list) and len(schema["allOf"]) == 1:
            return self.convert(schema["allOf"][0], f"{where}/allOf/0")
        if schema.keys() in ({"anyOf"}, {"oneOf"}):
            [(word, schemas)] = schema.items()
            if not isinstance(schemas, list) or not schemas:
                refuse(f"{where}/{word}", "must be a non-empty list")
            return self.either(self.convert(one, f"{where}/{word}/{at}") for at, one in enumerate(schemas))
        if not schema.keys() & set(COMBINING):
            return self._flat(schema, where)
        self._kept.append(whole)  # keeps its id from being reused
        return self._once(id(whole), lambda: self._flat(schema, where))

    def _flat(self, schema: Schema, where: str) -> str | None:
        return self.either(self._simple(one, where) for one in self.parts.flat(schema, where))

    def either(self, rules: Iterable[str | None]) -> str | None:
        """Return a rule with `rules` as alternatives."""
        alternatives = list(dict.fromkeys(rule for rule in rules if rule is not None))
        if len(alternatives) < 2:
            return alternatives[0] if alternatives else None
        return self.share(" | ".join(alternatives))

    def _once(self, of: str | int, convert: Callable[[], str | None]) -> str | None:
        """Return the rule that `convert` creates, once per schema; it may refer to itself."""
        key = (of, self._bare is None)
        if key in self._converting:  # a direct self-reference allows no further values
            return None
        if key not in self._memo:
            name = self._memo[key] = self.reserved()
            self._converting.add(key)
            rule = convert()
            self._converting.discard(key)
            if rule is None:
                self._memo[key] = None
            else:
                self.add(name, rule)
        return self._memo[key]

    def _simple(self, schema: Schema, where: str) -> str | None:
        """Return the rule for a schema from Subschemas.flat, which has no combining keywords."""
        excluded = schema.get("not", [])
        if any(one in (True, {}) for one in excluded):
            return None
        kinds = schema.get("type") or [
            kind for kind, words in ASSERTIONS.items() if schema.keys() & set(words) and "enum" not in schema
        ]
        if not kinds and excluded:
            kinds = [kind for kind in KINDS if kind != "integer"]
        for one in excluded:
            kinds = self._without(kinds, one, where)
        if "enum" in schema:
            return self._values(schema["enum"], schema, kinds, where)
        if not kinds:
            return None if "type" in schema or excluded else "value"
        return self.either(self._of_kind(kind, schema, where) for kind in kinds)

    def _without(self, kinds: list[str], excluded: Any, where: str) -> list[str]:
        """Return the types left by a `not`. Rejects a `not` that cannot be enforced."""
        if excluded is False:
            return kinds
        if isinstance(excluded, dict):
            if excluded.keys() == {"type"}:
                gone = excluded["type"] if isinstance(excluded["type"], list) else [excluded["type"]]
                return [kind for kind in kinds if kind not in gone and not (kind == "integer" and "number" in gone)]
            values = excluded.get("enum", [excluded.get("const")])
            if excluded.keys() & {"enum", "const"} and excluded.keys() <= {"type", "enum", "const"}:
                kinds = [kind for kind in kinds if kind != "null" or None not in values]
                if all(value is None or isinstance(value, str) for value in values):
                    return kinds
            elif kinds == ["string"] and excluded.keys() <= {"type", "pattern"}:
                return kinds
        self.cannot(where, "has the keyword 'not', which cannot be enforced")
        return kinds

    def _of_kind(self, kind: str, schema: Schema, where: str) -> str | None:
        if kind == "string":
            return self._string(schema, where)
        if kind in ("object", "array"):
            outside = self._converting, self._bare
            self._converting, self._bare = set(), None
            rule = object_rule(self, schema, where) if kind == "object" else array_rule(self, schema, where)
            self._converting, self._bare = outside
            return rule
        return self._number(schema, where, whole=kind == "integer") if kind in ("integer", "number") else kind

    def _values(self, values: list[Any], schema: Schema, kinds: list[str], where: str) -> str | None:
        """Return the rule for those of the values that the schema's types and bounds allow."""
        admitted = [value for value in values if self.admits(value, schema, kinds, where)]
        texts = [
            f"{self._quote}{value}{self._quote}" if self._bare and isinstance(value, str) else json_text(value)
            for value in admitted
        ]
        return self.share(trie(texts, self.share)) if texts else None

    def admits(self, value: Any, schema: Schema, kinds: list[str], where: str) -> bool:
        """Return whether the schema's types and bounds allow one of its own enum values."""
        if kinds and not any(is_of(value, kind) for kind in kinds):
            return False
        if isinstance(value, str) and schema.keys() & {*ASSERTIONS["string"], "not"}:
            term = self.strings.term(schema, where)
            return self.terms.automaton(term).matches(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return bounds_of(schema, where).admit(value)
        return True

    # Strings and numbers

    def _string(self, schema: Schema, where: str) -> str | None:
        if self._bare is None and not schema.keys() & {"pattern", "format", "contentEncoding", "not"}:
            low, high = lengths(schema, "minLength", "maxLength", where, MAX_LENGTH)
            if (low, high) == (0, None):
                return "string"
            return self.share(rf'"\"" {repeated("char", low, high, self.share)} "\""')
        try:
            term = self.strings.term(schema, where)
            if self._bare is not None:
                inside = self.text(self.terms.both(term, self._bare), escape=False)
                mark = literal(self._quote)
                return self.share(f"{mark} {inside} {mark}") if inside and self._quote else inside
            inside = "char*" if term is self.terms.all else self.text(term, escape=True)
        except TooLarge as error:
            refuse(where, f"has {', '.join(word for word in ASSERTIONS['string'] if word in schema)}, which {error}")
        return None if inside is None else self.share(rf'"\"" {inside} "\""')

    def text(self, term: Term, *, escape: bool) -> str | None:
        """Return the name of the rule for the texts of `term`. `escape`: as inside a JSON string."""
        key = (term, escape)
        if key not in self._automata:
            automaton = self.terms.automaton(term)
            self._automata[key] = name = None if automaton.void else f"{self._name}-t{len(self._automata)}"
            if name is not None:
                for rule, text in automaton.rules(name, self.share, escape=escape).items():
                    self.add(rule, text)
        return self._automata[key]

    def _number(self, schema: Schema, where: str, *, whole: bool) -> str | None:
        bounds = bounds_of(schema, where)
        if bounds == Bounds():
            return "integer" if whole else "number"
        try:
            return self.text(bounds.term(self.terms, whole=whole), escape=False)
        except TooLarge:
            refuse(where, f"has multipleOf {schema.get('multipleOf')}, which needs too large a grammar with its bounds")
        except ValueError as error:
            refuse(where, str(error))

    def separated(self, item: str, low: int, high: int | None) -> str:
        """Return `item` repeated `low` to `high` times, separated by commas; `high` must not be 0."""
        following = self.share(f'"," space {item}')
        items = f"{item} {repeated(following, max(0, low - 1), None if high is None else high - 1, self.share)}"
        return items if low else f"({items})?"
