"""A regular expression of a JSON schema as GBNF, matched inside a JSON string."""

from __future__ import annotations

import json
from re import _constants as ops  # type: ignore[attr-defined]  # re has no public parser
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from llamaherd_server.chat.gbnf import literal

Ranges = list[tuple[int, int]]

MAX_LENGTH = 1000
_LAST = 0x10FFFF
_EMPTY = '""'
# ECMA-262's classes, which JSON Schema means, are ASCII; white space as far as a JSON string can have it.
_CLASSES: dict[Any, Ranges] = {
    ops.CATEGORY_DIGIT: [(48, 57)],
    ops.CATEGORY_WORD: [(48, 57), (65, 90), (95, 95), (97, 122)],
    ops.CATEGORY_SPACE: [(9, 13), (32, 32), (0xA0, 0xA0)],
}
_NEGATED = {
    ops.CATEGORY_NOT_DIGIT: ops.CATEGORY_DIGIT,
    ops.CATEGORY_NOT_WORD: ops.CATEGORY_WORD,
    ops.CATEGORY_NOT_SPACE: ops.CATEGORY_SPACE,
}
# What a JSON string writes as an escape, not as itself.
_ESCAPED = [*range(0x20), ord('"'), ord("\\"), 0x7F]


def pattern_rule(pattern: Any) -> str:
    """GBNF of the inside of a JSON string that `pattern` is found in; raises ValueError for what it cannot express."""
    if not isinstance(pattern, str) or len(pattern) > MAX_LENGTH:
        raise ValueError(f"is no text of at most {MAX_LENGTH} characters")
    try:
        items = list(parser.parse(pattern))
    except (parser.error, OverflowError) as error:
        raise ValueError(f"is not a regular expression: {error}") from None
    starts = bool(items) and items[0] in ((ops.AT, ops.AT_BEGINNING), (ops.AT, ops.AT_BEGINNING_STRING))
    ends = bool(items) and items[-1] in ((ops.AT, ops.AT_END), (ops.AT, ops.AT_END_STRING))
    inner = _sequence(items[starts : len(items) - ends])
    return " ".join(["" if starts else "char*", inner, "" if ends else "char*"]).strip() or _EMPTY


def _sequence(items: Any) -> str:
    return " ".join(_item(op, argument) for op, argument in items)


def _item(op: Any, argument: Any) -> str:
    if op is ops.LITERAL:
        return literal(_json(argument))
    if op in (ops.NOT_LITERAL, ops.ANY, ops.IN):
        return _class(_set(op, argument))
    if op is ops.BRANCH:
        return _group(*argument[1])
    if op is ops.SUBPATTERN and not argument[1] and not argument[2]:  # without flags of its own
        return _group(argument[3])
    if op in (ops.MAX_REPEAT, ops.MIN_REPEAT):
        low, high, repeated = argument
        return f"{_group(repeated)}{{{low},{'' if high is ops.MAXREPEAT else high}}}"
    raise ValueError(f"uses {str(op).lower()}, which cannot be enforced")


def _group(*branches: Any) -> str:
    return f"({' | '.join(_sequence(branch) or _EMPTY for branch in branches)})"


def _set(op: Any, argument: Any) -> Ranges:
    if op is ops.ANY:
        return _complement([(10, 10), (13, 13)])
    if op is ops.NOT_LITERAL:
        return _complement([(argument, argument)])
    return _members(argument)


def _members(members: Any) -> Ranges:
    ranges: Ranges = []
    negated = False
    for op, argument in members:
        if op is ops.NEGATE:
            negated = True
        elif op is ops.LITERAL:
            ranges.append((argument, argument))
        elif op is ops.RANGE:
            ranges.append(argument)
        elif argument in _NEGATED:
            ranges += _complement(_CLASSES[_NEGATED[argument]])
        else:
            ranges += _CLASSES[argument]
    return _complement(ranges) if negated else ranges


def _complement(ranges: Ranges) -> Ranges:
    gaps, start = [], 0
    for low, high in sorted(ranges):
        if low > start:
            gaps.append((start, low - 1))
        start = max(start, high + 1)
    return [*gaps, (start, _LAST)] if start <= _LAST else gaps


def _class(ranges: Ranges) -> str:
    """One character of `ranges` as a JSON string writes it."""
    escaped = [code for code in _ESCAPED if any(low <= code <= high for low, high in ranges)]
    excluded = _complement([(code, code) for code in _ESCAPED])
    plain = [(max(low, a), min(high, b)) for low, high in ranges for a, b in excluded if max(low, a) <= min(high, b)]
    alternatives = [literal(_json(code)) for code in escaped]
    if plain:
        alternatives.insert(0, f"[{''.join(f'{_code(low)}-{_code(high)}' for low, high in plain)}]")
    if not alternatives:
        raise ValueError("has an empty set of characters")
    return f"({' | '.join(alternatives)})"


def _json(code: int) -> str:
    return json.dumps(chr(code), ensure_ascii=False)[1:-1]


def _code(code: int) -> str:
    return f"\\U{code:08X}"
