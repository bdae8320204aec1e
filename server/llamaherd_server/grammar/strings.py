"""The languages of string schemas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llamaherd_server.grammar.automaton import MAX_STATES
from llamaherd_server.grammar.language import Term, Terms, TooLarge
from llamaherd_server.grammar.pattern import language_of
from llamaherd_server.grammar.string_formats import FORMATS, UNCONSTRAINED
from llamaherd_server.grammar.subschemas import Schema, number, refuse

MAX_LENGTH = 1_000_000
_MIN_REDUCED_LENGTH = 200
_UNUSUAL_LENGTH = 1000  # texts with a pattern or format are rarely this long: pydantic limits URLs to 2083
_ENCODINGS = {"base64": "base64", "base64url": "base64url"}


class Strings:
    """Creates the languages of string schemas. Calls `cannot(where, problem)` for each keyword that is not enforced."""

    def __init__(self, terms: Terms, cannot: Callable[[str, str], None]) -> None:
        self._terms = terms
        self._cannot = cannot

    def term(self, schema: Schema, where: str) -> Term:
        """Return the texts that `schema` allows. Raises Refused and TooLarge."""
        terms = self._terms
        low, high = lengths(schema, "minLength", "maxLength", where, MAX_LENGTH)
        patterns = terms.both(*(self._pattern(pattern, where, terms.all) for pattern in schema.get("pattern", ())))
        formats = terms.both(
            *(self._format(name, where, beside_pattern="pattern" in schema) for name in schema.get("format", ())),
            *(self._encoding(name) for name in schema.get("contentEncoding", ())),
        )
        excluded = [self._excluded(one, where) for one in schema.get("not", ())]
        patterns = terms.both(patterns, *(terms.other(term) for term in excluded if term is not None))
        both = terms.both(patterns, formats)
        if formats is not terms.all and patterns is not terms.all:
            try:
                # zod's time has a format that requires an offset and a pattern that forbids it.
                both = patterns if terms.automaton(both).void else both
            except TooLarge:  # zod's hostname has a pattern like its format, but with counts
                both = formats
        if high is not None and both is not terms.all:
            automaton = terms.automaton(both)
            states, longest = len(automaton.edges), automaton.longest
            if states * high > MAX_STATES and states * _MIN_REDUCED_LENGTH <= MAX_STATES:
                high = max(low, MAX_STATES // states)
            elif states * high > MAX_STATES:
                if high < _UNUSUAL_LENGTH and (longest is None or longest > high):
                    self._cannot(where, f"has maxLength {high}, which cannot be enforced beside its pattern or format")
                high = None
        return terms.both(both, terms.repeat(terms.any, low, high))

    def _pattern(self, pattern: Any, where: str, otherwise: Term) -> Term:
        """Return the texts in which `pattern` matches, or `otherwise` if it cannot be enforced."""
        try:
            return language_of(self._terms, pattern)
        except ValueError as error:
            self._cannot(where, f"has the pattern {pattern!r:.200}, which {error}")
            return otherwise

    def _format(self, name: Any, where: str, *, beside_pattern: bool = False) -> Term:
        if isinstance(name, str) and name in FORMATS:
            return language_of(self._terms, f"^(?:{FORMATS[name]})$")
        if not beside_pattern and (not isinstance(name, str) or name not in UNCONSTRAINED):
            self._cannot(where, f"has the format {name!r:.200}, which cannot be enforced")
        return self._terms.all

    def _encoding(self, name: Any) -> Term:
        known = _ENCODINGS.get(name) if isinstance(name, str) else None
        return self._format(known, "") if known else self._terms.all

    def _excluded(self, schema: Any, where: str) -> Term | None:
        """Return the texts that a `not` excludes; None: it is not about texts."""
        if (
            isinstance(schema, dict)
            and schema.keys() <= {"type", "enum", "const"}
            and schema.keys() & {"enum", "const"}
        ):
            values = schema["enum"] if "enum" in schema else [schema["const"]]
            return self._terms.either(*(self._terms.text(value) for value in values if isinstance(value, str)))
        if isinstance(schema, dict) and schema.keys() <= {"type", "pattern"} and "pattern" in schema:
            return self._pattern(schema["pattern"], where, self._terms.nothing)
        return None


def lengths(schema: Schema, least: str, most: str, where: str, limit: int) -> tuple[int, int | None]:
    """Return the values of the keywords `least` and `most` (None: no maximum). Reduces the latter to `limit`."""
    for word in (least, most):
        if word in schema and (number(schema, word, where) % 1 or number(schema, word, where) < 0):
            refuse(where, f"has {word} {schema[word]!r}: it must be a non-negative integer")
    low = int(number(schema, least, where)) if least in schema else 0
    high = min(int(number(schema, most, where)), limit) if most in schema else None
    if low > limit:
        refuse(where, f"has {least} {low}: it must be at most {limit}")
    if high is not None and low > high:
        refuse(where, f"has {least} {low} above {most} {high}")
    return low, high
