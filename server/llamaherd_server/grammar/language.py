"""Regular languages as terms, closed under intersection and complement, and their deterministic automata.

The automaton is built state by state from derivatives of regular expressions (Brzozowski, 1964). This also covers
lookaheads, length bounds and combinations of patterns.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from math import gcd
from typing import Any

from llamaherd_server.grammar.automaton import MAX_STATES, Automaton
from llamaherd_server.grammar.ranges import LAST, Ranges, classes_of, merged, minus

MAX_TERMS = 100_000
_SURROGATES = (0xD800, 0xDFFF)


class TooLarge(ValueError):
    """An automaton would need too many states, or a schema too many terms."""

    def __init__(self) -> None:
        super().__init__(f"needs an automaton of more than {MAX_STATES} states: shorten or simplify it")


class Term:
    """A regular language. Only Terms creates them, so equal terms are identical objects."""

    __slots__ = ("arguments", "kind", "nullable", "number")

    def __init__(self, kind: str, arguments: tuple[Any, ...], nullable: bool, number: int) -> None:
        self.kind = kind
        self.arguments = arguments
        self.nullable = nullable
        self.number = number


class Terms:
    """Creates and interns the terms of one schema, at most MAX_TERMS."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], Term] = {}
        self._derivatives: dict[tuple[Term, int], Term] = {}
        self._automata: dict[Term, Automaton] = {}
        self.nothing = self._term("set", (), nullable=False)
        self.empty = self._term("empty", (), nullable=True)
        self.any = self.chars([(0, LAST)])
        self.all = self.repeat(self.any, 0, None)

    def _term(self, kind: str, arguments: tuple[Any, ...], *, nullable: bool) -> Term:
        key = (kind, *arguments)
        found = self._made.get(key)
        if found is None:
            if len(self._made) > MAX_TERMS:
                raise TooLarge
            found = self._made[key] = Term(kind, arguments, nullable, len(self._made))
        return found

    def chars(self, ranges: Iterable[tuple[int, int]]) -> Term:
        """Return the language of one character of `ranges`, without surrogates."""
        return self._term("set", minus(ranges, [_SURROGATES]), nullable=False)

    def text(self, text: str) -> Term:
        """Return the language of exactly `text`."""
        return self.sequence(*(self._term("set", ((code, code),), nullable=False) for code in map(ord, text)))

    def sequence(self, *terms: Term) -> Term:
        return reduce(lambda then, first: self._pair(first, then), reversed(terms), self.empty)

    def _pair(self, first: Term, then: Term) -> Term:
        if first is self.nothing or then is self.nothing:
            return self.nothing
        if first is self.empty:
            return then
        if then is self.empty:
            return first
        if first.kind == "pair":
            return self._pair(first.arguments[0], self._pair(first.arguments[1], then))
        return self._term("pair", (first, then), nullable=first.nullable and then.nullable)

    def either(self, *terms: Term) -> Term:
        return self._combined("either", terms, neutral=self.nothing, absorbing=self.all)

    def both(self, *terms: Term) -> Term:
        return self._combined("both", terms, neutral=self.all, absorbing=self.nothing)

    def _combined(self, kind: str, terms: Iterable[Term], *, neutral: Term, absorbing: Term) -> Term:
        parts: set[Term] = set()
        for term in terms:
            parts.update(term.arguments if term.kind == kind else (term,))
        parts.discard(neutral)
        if absorbing in parts:
            return absorbing
        if not parts:
            return neutral
        ordered = tuple(sorted(parts, key=lambda part: part.number))
        all_or_any = any if kind == "either" else all
        nullable = all_or_any(part.nullable for part in ordered)
        return ordered[0] if len(ordered) == 1 else self._term(kind, ordered, nullable=nullable)

    def other(self, term: Term) -> Term:
        """Return the complement of `term`."""
        opposites = {self.nothing: self.all, self.all: self.nothing}
        if term in opposites:
            return opposites[term]
        return term.arguments[0] if term.kind == "other" else self._term("other", (term,), nullable=not term.nullable)

    def repeat(self, term: Term, low: int, high: int | None) -> Term:
        """Return `term` repeated `low` to `high` times; None: no upper bound."""
        low = 0 if term.nullable else low
        if high == 0 or term is self.empty or (term is self.nothing and low == 0):
            return self.empty
        if term is self.nothing or (low, high) == (1, 1) or (term.kind == "repeat" and term.arguments[1:] == (0, None)):
            return term
        return self._term("repeat", (term, low, high), nullable=low == 0)

    def multiple(self, of: int, places: int, remainder: int = 0, used: int | None = None) -> Term:
        """Return decimal numbers with up to `places` fraction digits whose value * 10**places is a multiple of `of`.

        `remainder`: of the digits read so far; `used`: how many of them are fraction digits, None before the dot.
        """
        scale = 10 ** (places - (used or 0))
        remainder %= of // gcd(of, scale)  # equivalent remainders share a state
        return self._term("multiple", (of, places, remainder, used), nullable=remainder * scale % of == 0)

    def derivative(self, term: Term, code: int) -> Term:
        """Return the Brzozowski derivative: what may follow an initial character `code` in texts of `term`."""
        key = (term, code)
        found = self._derivatives.get(key)
        if found is None:
            if len(self._derivatives) > 4 * MAX_TERMS:
                raise TooLarge
            found = self._derivatives[key] = self._derived(term, code)
        return found

    def _derived(self, term: Term, code: int) -> Term:  # noqa: PLR0911 (one return for each kind)
        arguments = term.arguments
        match term.kind:
            case "empty":
                return self.nothing
            case "set":
                return self.empty if any(low <= code <= high for low, high in arguments) else self.nothing
            case "multiple":
                return self._next_digit(code, *arguments)
            case "repeat":
                inner, low, high = arguments
                rest = self.repeat(inner, max(low - 1, 0), None if high is None else high - 1)
                return self._pair(self.derivative(inner, code), rest)
            case "pair":
                first, then = arguments
                after = self._pair(self.derivative(first, code), then)
                return self.either(after, self.derivative(then, code)) if first.nullable else after
            case "other":
                return self.other(self.derivative(arguments[0], code))
            case "both":
                return self.both(*(self.derivative(part, code) for part in arguments))
            case _:
                return self.either(*(self.derivative(part, code) for part in arguments))

    def _next_digit(self, code: int, of: int, places: int, remainder: int, used: int | None) -> Term:
        digit = code - ord("0")
        if code == ord(".") and used is None and places:
            return self.multiple(of, places, remainder, 0)
        if not 0 <= digit <= 9 or used == places:
            return self.nothing
        return self.multiple(of, places, remainder * 10 + digit, None if used is None else used + 1)

    def automaton(self, term: Term) -> Automaton:
        """Return the deterministic automaton of `term`. Raises TooLarge."""
        if term not in self._automata:
            self._automata[term] = self._built(term)
        return self._automata[term]

    def _built(self, term: Term) -> Automaton:
        classes = classes_of(_sets(term))
        numbers = {term: 0}
        states = [term]
        edges: list[list[tuple[Ranges, int]]] = []
        for state in states:  # grows during the loop
            targets: dict[Term, list[tuple[int, int]]] = {}
            for ranges in classes:
                targets.setdefault(self.derivative(state, ranges[0][0]), []).extend(ranges)
            targets.pop(self.nothing, None)
            for target in targets.keys() - numbers.keys():
                numbers[target] = len(states)
                states.append(target)
            if len(states) > MAX_STATES:
                raise TooLarge
            edges.append([(merged(ranges), numbers[target]) for target, ranges in targets.items()])
        return Automaton.pruned(edges, [state.nullable for state in states])


def _sets(term: Term) -> set[Ranges]:
    """Return the sets of characters that `term` distinguishes."""
    sets: set[Ranges] = {((0, LAST),)}
    seen, queue = {term}, [term]
    while queue:
        one = queue.pop()
        if one.kind == "set":
            sets.add(one.arguments)
        elif one.kind == "multiple":
            sets.update(((code, code),) for code in map(ord, ".0123456789"))
        new = {part for part in one.arguments if isinstance(part, Term)} - seen
        seen |= new
        queue += new
    return sets
