"""Numbers within bounds, and multiples, as languages of their JSON texts."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from math import ceil, floor

from llamaherd_server.grammar.language import Term, Terms
from llamaherd_server.grammar.string_formats import INTEGERS
from llamaherd_server.grammar.subschemas import ASSERTIONS, Schema, number, refuse

# A double represents every integer of this many digits exactly. Unless a minimum is larger, integer parts end there.
DIGITS = 15
LARGEST = 10**DIGITS - 1
MAX_DIGITS = 40
_FRACTION = 16


@dataclass(frozen=True, slots=True)
class Bounds:
    """The bounds of a number; None: no bound. `above` and `below` are exclusive; `multiple_of` is positive."""

    least: Decimal | None = None
    most: Decimal | None = None
    above: Decimal | None = None
    below: Decimal | None = None
    multiple_of: Decimal | None = None

    def admit(self, value: float) -> bool:
        exact = Decimal(str(value))
        return (
            (self.least is None or exact >= self.least)
            and (self.most is None or exact <= self.most)
            and (self.above is None or exact > self.above)
            and (self.below is None or exact < self.below)
            and (self.multiple_of is None or exact % self.multiple_of == 0)
        )

    def term(self, terms: Terms, *, whole: bool) -> Term:
        """Return the numbers (`whole`: integers) within the bounds, without exponents. Raises ValueError."""
        negated = Bounds(_negative(self.most), _negative(self.least), _negative(self.below), _negative(self.above))
        positive = self._magnitudes(terms, whole=whole)
        negative = negated._magnitudes(terms, whole=whole)
        zero = terms.sequence(terms.text("0"), _optional_zeros(terms))
        negative = terms.sequence(terms.text("-"), terms.both(negative, terms.other(zero), self._multiples(terms)))
        return terms.either(terms.both(positive, self._multiples(terms)), negative)

    def _multiples(self, terms: Terms) -> Term:
        if self.multiple_of is None:
            return terms.all
        exponent = int(self.multiple_of.as_tuple().exponent)
        if exponent < 0:
            return terms.multiple(int(self.multiple_of.scaleb(-exponent)), -exponent)
        digits = str(int(self.multiple_of))
        zeros = len(digits) - len(digits.rstrip("0"))  # matched literally: each would multiply the states
        multiples = terms.sequence(terms.multiple(int(digits) // 10**zeros, 0), terms.text("0" * zeros))
        return terms.either(multiples, terms.text("0"))

    def _magnitudes(self, terms: Terms, *, whole: bool) -> Term:
        """Return the language of non-negative numbers within the bounds, apart from `multiple_of`."""
        lows = [
            (bound, exclusive) for bound, exclusive in ((self.least, False), (self.above, True)) if bound is not None
        ]
        highs = [
            (bound, exclusive) for bound, exclusive in ((self.most, False), (self.below, True)) if bound is not None
        ]
        if any(bound < 0 or (bound == 0 and exclusive) for bound, exclusive in highs):
            return terms.nothing
        largest = max([LARGEST, *(10 ** (len(str(floor(bound))) + 1) - 1 for bound, _ in lows if bound > LARGEST)])
        if len(str(largest)) > MAX_DIGITS:
            raise ValueError(f"has a bound of more than {MAX_DIGITS} digits")
        if whole:
            low = max([0, *(floor(bound) + 1 if exclusive else ceil(bound) for bound, exclusive in lows)])
            high = min([largest, *(ceil(bound) - 1 if exclusive else floor(bound) for bound, exclusive in highs)])
            return integers(terms, low, high)
        fraction = terms.sequence(terms.text("."), terms.repeat(_digit(terms, 0, 9), 1, _FRACTION))
        shape = terms.sequence(integers(terms, 0, largest), terms.repeat(fraction, 0, 1))
        limits = [_limited(terms, bound, exclusive, 1, largest) for bound, exclusive in lows if bound >= 0]
        limits += [_limited(terms, bound, exclusive, -1, largest) for bound, exclusive in highs if bound <= largest]
        return terms.both(shape, *limits)


def bounds_of(schema: Schema, where: str) -> Bounds:
    """Return the bounds in a number schema, including those of OpenAPI's integer formats."""
    values = {word: number(schema, word, where) for word in ASSERTIONS["number"] if word in schema}
    if "multipleOf" in values and values["multipleOf"] <= 0:
        refuse(where, f"has multipleOf {schema['multipleOf']}: it must be above 0")
    for name in schema.get("format", ()):
        if isinstance(name, str) and name in INTEGERS and "int" in name:
            least, most = INTEGERS[name]
            values["minimum"] = max(values.get("minimum", least), least)
            values["maximum"] = min(values.get("maximum", most), most)
    return Bounds(
        values.get("minimum"),
        values.get("maximum"),
        values.get("exclusiveMinimum"),
        values.get("exclusiveMaximum"),
        values.get("multipleOf"),
    )


def integers(terms: Terms, low: int, high: int) -> Term:
    """Return the integers from `low` to `high`, 0 <= low, as alternatives for each number of digits."""
    alternatives: list[Term] = []
    while low <= high:
        last = min(high, 10 ** len(str(low)) - 1)
        alternatives.append(_same_length(terms, str(low), str(last)))
        low = last + 1
    return terms.either(*alternatives)


def _same_length(terms: Terms, low: str, high: str) -> Term:
    if not low:
        return terms.empty
    rest = len(low) - 1
    if not low.strip("0") and not high.strip("9"):
        return terms.repeat(_digit(terms, 0, 9), len(low), len(low))
    if low[0] == high[0]:
        return terms.sequence(terms.text(low[0]), _same_length(terms, low[1:], high[1:]))
    return terms.either(
        terms.sequence(terms.text(low[0]), _same_length(terms, low[1:], "9" * rest)),
        terms.sequence(_digit(terms, int(low[0]) + 1, int(high[0]) - 1), terms.repeat(_digit(terms, 0, 9), rest, rest)),
        terms.sequence(terms.text(high[0]), _same_length(terms, "0" * rest, high[1:])),
    )


def _limited(terms: Terms, bound: Decimal, exclusive: bool, sign: int, largest: int) -> Term:
    """Return the decimal texts above (`sign` 1) or below (-1) a non-negative bound."""
    whole = floor(bound)
    digits = f"{bound - whole:f}".partition(".")[2].rstrip("0")
    beyond = integers(terms, whole + 1, largest) if sign > 0 else integers(terms, 0, whole - 1)
    any_fraction = terms.repeat(terms.sequence(terms.text("."), terms.all), 0, 1)
    tail = _fraction(terms, digits, exclusive=exclusive, sign=sign)
    same = terms.sequence(terms.text("."), tail)
    if not (exclusive if not digits else sign > 0):
        same = terms.either(same, terms.empty)
    return terms.either(terms.sequence(beyond, any_fraction), terms.sequence(terms.text(str(whole)), same))


def _fraction(terms: Terms, digits: str, *, exclusive: bool, sign: int) -> Term:
    """Return the fraction digits whose value is above (`sign` 1) or below (-1) that of `digits`."""
    zeros = terms.repeat(terms.text("0"), 0, None)
    if not digits:
        some = terms.both(terms.all, terms.other(zeros)) if exclusive else terms.all
        return some if sign > 0 else terms.nothing if exclusive else zeros
    digit = int(digits[0])
    beyond = _digit(terms, digit + 1, 9) if sign > 0 else _digit(terms, 0, digit - 1)
    same = terms.sequence(terms.text(digits[0]), _fraction(terms, digits[1:], exclusive=exclusive, sign=sign))
    ended = terms.nothing if sign > 0 else terms.empty  # a prefix of `digits` is smaller: they do not end in 0
    return terms.either(terms.sequence(beyond, terms.all), same, ended)


def _digit(terms: Terms, low: int, high: int) -> Term:
    return terms.chars([(ord("0") + low, ord("0") + high)] if low <= high else [])


def _optional_zeros(terms: Terms) -> Term:
    return terms.repeat(terms.sequence(terms.text("."), terms.repeat(terms.text("0"), 1, None)), 0, 1)


def _negative(bound: Decimal | None) -> Decimal | None:
    return None if bound is None else -bound
