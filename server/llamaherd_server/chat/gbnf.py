"""The rules of JSON as GBNF, and the rules of numbers within bounds."""

from __future__ import annotations

import json
from collections.abc import Callable

# Bounded white space: a model that may write any amount of it sometimes never stops.
PRIMITIVES = {
    "space": r'| " " | "\n" [ \t]{0,20}',
    # No control characters, and no halves of surrogate pairs: what is matched is one character of the text.
    "char": r'[^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" escape)',
    "escape": "([0-9A-Ca-cE-Fe-f] [0-9A-Fa-f] | [Dd] [0-7]) [0-9A-Fa-f]{2}",
    "string": r'"\"" char* "\""',
    "integer": r'"-"? ("0" | [1-9] [0-9]{0,14})',
    "number": r'integer ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,2})?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "object": r'"{" space (pair ("," space pair)*)? "}"',
    "pair": r'string space ":" space value space',
    "array": r'"[" space (value space ("," space value space)*)? "]"',
    "value": "object | array | string | number | boolean | null",
}
# Strings of these formats; RFC 3339 and RFC 9562.
_DATE = '[0-9]{4} "-" ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | [12] [0-9] | "3" [01])'
_CLOCK = '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9]'
_TIME = f'{_CLOCK} ":" [0-5] [0-9] ("." [0-9]{{1,9}})? ("Z" | [-+] {_CLOCK})'
_HEX = "[0-9a-f]"
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f'{_DATE} "T" {_TIME}',
    "uuid": f'{_HEX}{{8}} "-" {_HEX}{{4}} "-" {_HEX}{{4}} "-" {_HEX}{{4}} "-" {_HEX}{{12}}',
}

# Every number within it is exact in a double, and it bounds what has no bound of its own.
LARGEST = 10**15 - 1


def literal(text: str) -> str:
    """A GBNF literal of exactly `text`."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
    return f'"{escaped}"'


def without(name: str, markers: tuple[str, ...], *, not_first: str = "") -> dict[str, str]:
    """Rules of any text without one of `markers` in it, which does not begin with the character `not_first`.

    An automaton over how much of a marker the text ends with (Aho and Corasick, 1975), begun by the rule `name`.
    """
    prefixes = ["", *sorted({marker[:size] for marker in markers for size in range(1, len(marker))})]
    alphabet = sorted({char for marker in markers for char in marker})

    def after(seen: str) -> str | None:
        while seen not in prefixes:
            if seen in markers:
                return None
            seen = seen[1:]
        return None if any(seen.endswith(marker) for marker in markers) else seen

    def rule(prefix: str, excluded: str = "") -> str:
        others = f"{characters([*alphabet, *excluded], negate=True)} {name}-0"
        known = (
            f"{literal(char)} {name}-{prefixes.index(target)}"
            for char in alphabet
            if char not in excluded and (target := after(prefix + char)) is not None
        )
        return " | ".join(['""', *known, others])

    return {name: rule("", not_first), **{f"{name}-{number}": rule(one) for number, one in enumerate(prefixes)}}


def characters(chars: list[str], *, negate: bool) -> str:
    """A GBNF class of these characters, or of all others."""
    escapes = {"\\": "\\\\", "]": "\\]", "[": "\\[", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    inside = "".join(
        escapes.get(char, char) for char in sorted(set(chars), key=lambda char: (char in "^-", char == "-"))
    )
    return f"[{'^' if negate else ''}{inside}]"


def constant(value: object) -> str:
    """The literal of a JSON value; raises ValueError for NaN and the infinities."""
    return literal(json.dumps(value, ensure_ascii=False, allow_nan=False))


def integers(low: int, high: int) -> str:
    """The whole numbers from `low` to `high`."""
    return _signed(low, high, 1, _digits)


def numbers(low: int, high: int) -> str:
    """The numbers, fractions included, from `low` to `high`."""
    return _signed(low, high, 0, _decimals)


def _signed(low: int, high: int, least_negative: int, magnitudes: Callable[[int, int], str]) -> str:
    alternatives = []
    if low < 0:
        alternatives.append(f'"-" ({magnitudes(max(least_negative, -high), -low)})')
    if high >= 0:
        alternatives.append(magnitudes(max(0, low), high))
    return " | ".join(alternatives)


def _decimals(low: int, high: int) -> str:
    """The decimal numbers 0 <= low..high."""
    whole = f'{literal(str(high))} ("." "0"{{1,16}})?'
    return f'({_digits(low, high - 1)}) ("." [0-9]{{1,16}})? | {whole}' if low < high else whole


def _digits(low: int, high: int) -> str:
    """The whole numbers 0 <= low..high: alternatives for each number of digits, then digit by digit."""
    alternatives: list[str] = []
    while low <= high:
        last = min(high, 10 ** len(str(low)) - 1)
        alternatives += _same_length(str(low), str(last))
        low = last + 1
    return " | ".join(alternatives)


def _same_length(low: str, high: str) -> list[str]:
    if low == high:
        return [literal(low)]
    if low[0] == high[0]:
        return [f"{literal(low[0])} ({' | '.join(_same_length(low[1:], high[1:]))})"]
    first, last, rest = int(low[0]), int(high[0]), len(low) - 1
    alternatives = []
    if low[1:].strip("0"):  # not all numbers that begin with this digit
        alternatives.append(f"{literal(low[0])} ({' | '.join(_same_length(low[1:], '9' * rest))})")
        first += 1
    if high[1:].strip("9"):
        alternatives.append(f"{literal(high[0])} ({' | '.join(_same_length('0' * rest, high[1:]))})")
        last -= 1
    if first <= last:
        alternatives.append(f"[{first}-{last}]" + (f" [0-9]{{{rest}}}" if rest else ""))
    return alternatives
