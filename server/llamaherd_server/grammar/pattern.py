"""Converts a regular expression of a JSON schema to the language of texts in which it matches."""

from __future__ import annotations

from typing import Any

from llamaherd_server.grammar.language import Term, Terms
from llamaherd_server.grammar.regex import Node, read

MAX_LENGTH = 4000


def language_of(terms: Terms, pattern: Any) -> Term:
    """Return the texts in which `pattern` matches anywhere. Raises ValueError if it is invalid or not regular."""
    if not isinstance(pattern, str) or len(pattern) > MAX_LENGTH:
        raise ValueError(f"must be a string of at most {MAX_LENGTH} characters")
    node = read(pattern)
    later = terms.sequence(terms.any, terms.all, _term(terms, node, terms.all, first=False))
    return terms.either(_term(terms, node, terms.all, first=True), later)


def _term(terms: Terms, node: Node, then: Term, *, first: bool | None) -> Term:  # noqa: PLR0911 (one return for each kind)
    """Return the language of `node` followed by `then`. `first`: whether the text begins here; None: unknown."""
    match node.kind:
        case "set":
            return terms.sequence(terms.chars(node.value), then)
        case "sequence":
            return _sequence(terms, node, then, first)
        case "either":
            return terms.either(*(_term(terms, branch, then, first=first) for branch in node.parts))
        case "repeat":
            return _repeat(terms, node, then, first)
        case "last":
            return terms.empty if then.nullable else terms.nothing
        case "first":
            if first is None:
                raise ValueError("uses an anchor after a part that may be empty, which cannot be enforced")
            return then if first else terms.nothing
        case _:
            ahead = _term(terms, node.parts[0], terms.all, first=first)
            return terms.both(then, ahead if node.kind == "ahead" else terms.other(ahead))


def _sequence(terms: Terms, node: Node, then: Term, first: bool | None) -> Term:
    begins = []
    for part in node.parts:
        begins.append(first)
        first = False if part.takes or first is False else first if part.void else None
    for part, begin in reversed(list(zip(node.parts, begins, strict=True))):
        then = _term(terms, part, then, first=begin)
    return then


def _repeat(terms: Terms, node: Node, then: Term, first: bool | None) -> Term:
    (low, high), repeated = node.value, node.parts[0]
    if (low, high) == (0, 1):
        return terms.either(then, _term(terms, repeated, then, first=first))
    if not repeated.context_free:
        raise ValueError("repeats an anchor or a lookahead, which cannot be enforced")
    once = _term(terms, repeated, terms.empty, first=None)
    return terms.sequence(terms.repeat(once, low, high), then)
