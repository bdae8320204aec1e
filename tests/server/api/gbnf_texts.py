"""Random texts of a GBNF grammar, as far as our own grammars go: to hold them against what they were made from."""

from __future__ import annotations

import re
from random import Random
from typing import Any

_TOKEN = re.compile(
    r"""\s*(?: "(?P<literal>(?:\\.|[^"\\])*)" | \[(?P<set>(?:\\.|[^\]\\])*)\] | (?P<name>[a-z][a-zA-Z0-9-]*)
    | \{(?P<count>\d+(?:,\d*)?)\} | (?P<sign>[*+?|()]) )""",
    re.VERBOSE,
)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}
_CODE = re.compile(r"\\x([0-9A-F]{2})|\\u([0-9A-F]{4})|\\U([0-9A-F]{8})|\\(.)", re.DOTALL)
_REPEATS = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_DEPTH = 40


class Texts:
    """Makes texts that the grammar allows; those that grow too deep end in `TooDeep`."""

    def __init__(self, grammar: str, seed: int) -> None:
        self._random = Random(seed)
        self._rules: dict[str, Any] = {}
        for line in grammar.splitlines():
            name, _, rule = line.partition(" ::= ")
            self._rules[name] = _parsed(rule)

    def one(self) -> str:
        """A text; raises RecursionError where chance leads on and on."""
        return self._written(("name", "root"), 0)

    def _written(self, node: Any, depth: int) -> str:
        kind, value = node[0], node[1]
        if kind == "literal":
            return str(value)
        if kind == "set":
            low, high = self._random.choice(value)
            return chr(self._random.randint(low, min(high, low + 90)))
        if kind == "name":
            if depth > _DEPTH:
                raise RecursionError
            return self._written(self._rules[value], depth + 1)
        if kind == "either":
            return self._written(self._random.choice(value), depth)
        if kind == "repeat":
            low, high = node[2]
            more = self._random.choice((0, 0, 1, 2, 5))
            count = low + (more if high is None else min(more, high - low))
            return "".join(self._written(value, depth) for _ in range(count))
        return "".join(self._written(part, depth) for part in value)


def _parsed(rule: str) -> Any:
    tokens = [(match.lastgroup or "", match[match.lastgroup or ""]) for match in _TOKEN.finditer(rule)]
    node, rest = _alternatives(tokens)
    assert not rest, rule
    return node


def _alternatives(tokens: list[tuple[str, str]]) -> tuple[Any, list[tuple[str, str]]]:
    options: list[Any] = []
    parts: list[Any] = []
    while tokens:
        (kind, text), tokens = tokens[0], tokens[1:]
        if (kind, text) == ("sign", ")"):
            break
        if (kind, text) == ("sign", "|"):
            options.append(("sequence", parts))
            parts = []
        elif (kind, text) == ("sign", "("):
            inner, tokens = _alternatives(tokens)
            parts.append(inner)
        elif kind == "sign":
            parts[-1] = ("repeat", parts[-1], _REPEATS[text])
        elif kind == "count":
            low, comma, high = text.partition(",")
            parts[-1] = ("repeat", parts[-1], (int(low), int(high) if high else None if comma else int(low)))
        elif kind == "set":
            parts.append(("set", _ranges(text)))
        else:
            parts.append((kind, _plain(text) if kind == "literal" else text))
    return ("either", [*options, ("sequence", parts)]), tokens


def _plain(text: str) -> str:
    def char(match: re.Match[str]) -> str:
        code = match[1] or match[2] or match[3]
        return chr(int(code, 16)) if code else _ESCAPES.get(match[4], match[4])

    return _CODE.sub(char, text)


def _ranges(text: str) -> list[tuple[int, int]]:
    if text.startswith("^"):
        return [(ord("a"), ord("z")), (0xE9, 0xE9), (0x1F600, 0x1F600)]  # of all others, some
    symbols = [(match[0], ord(_plain(match[0]))) for match in re.finditer(r"\\x..|\\u.{4}|\\U.{8}|\\.|.", text)]
    ranges = []
    while symbols:
        (_, low), symbols = symbols[0], symbols[1:]
        if len(symbols) > 1 and symbols[0][0] == "-":
            ranges.append((low, symbols[1][1]))
            symbols = symbols[2:]
        else:
            ranges.append((low, low))
    return ranges
