"""Parses the regular expressions of JSON schemas: ECMA-262 in Unicode mode, without lookbehind.

Also accepts what pydantic passes through from Python's and Rust's dialects: leading `(?i)` and `(?s)`, `(?P<name>…)`,
`\\A`, `\\Z`, `\\z` and `{,n}`.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

from llamaherd_server.grammar.ranges import LAST, Ranges, complement, merged

_LINE_ENDS: Ranges = ((10, 10), (13, 13), (0x2028, 0x2029))
# ECMA-262's classes are ASCII, except for white space.
_CLASSES: dict[str, Ranges] = {
    "d": ((48, 57),),
    "w": ((48, 57), (65, 90), (95, 95), (97, 122)),
    "s": (
        *((9, 13), (0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029)),
        *((0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000)),
    ),
}
_CONTROLS = {"0": 0, "b": 8, "t": 9, "n": 10, "v": 11, "f": 12, "r": 13}
# Python's Unicode tables have no emoji property, so these are blocks that contain only emoji.
_EMOJI: Ranges = ((0x1F300, 0x1F321), (0x1F330, 0x1F393), (0x1F600, 0x1F64F), (0x1F680, 0x1F6C5), (0x1F90C, 0x1F93A))
_FLAGS = (0x1F1E6, 0x1F1FF)
_JOINERS: Ranges = ((35, 35), (42, 42), (48, 57), (0x200D, 0x200D), (0x20E3, 0x20E3), (0xFE0F, 0xFE0F))
_PROPERTIES: dict[str, Ranges] = {
    **dict.fromkeys(("Extended_Pictographic", "Emoji_Presentation", "Emoji"), _EMOJI),
    "Regional_Indicator": (_FLAGS,),
    "Emoji_Component": (*_JOINERS, _FLAGS, (0x1F3FB, 0x1F3FF)),
}
_CATEGORIES = {"Letter": "L", "Alphabetic": "L", "Number": "N", "Punctuation": "P", "Symbol": "S", "Separator": "Z"} | {
    "Uppercase_Letter": "Lu", "Lowercase_Letter": "Ll", "Uppercase": "Lu", "Lowercase": "Ll", "Decimal_Number": "Nd",
    "Mark": "M",
}  # fmt: skip

_LEADING_FLAGS = re.compile(r"\(\?([isu]+)\)")
_ANCHOR = re.compile(r"(\^|\\A)|\$|\\[zZ]")
_QUANTIFIER = re.compile(r"(?:([*+?])|\{(?=,?[0-9])([0-9]*)(,?)([0-9]*)\})\??")
_GROUP = re.compile(r"\((?:\?(?::|P?<\w+>|([=!]))|(?!\?))")
_ESCAPE = re.compile(
    r"\\(?:(?P<kind>[dDwWsS])|(?P<property>[pP])\{(?:General_Category=|gc=)?(?P<name>[^}]*)\}"
    r"|u(?P<high>[dD][89abAB][0-9A-Fa-f]{2})\\u(?P<low>[dD][c-fC-F][0-9A-Fa-f]{2})"
    r"|x(?P<x>[0-9A-Fa-f]{2})|u(?P<u>[0-9A-Fa-f]{4})|u\{(?P<braced>[0-9A-Fa-f]+)\}|U(?P<U>[0-9A-Fa-f]{8})"
    r"|c(?P<letter>[A-Za-z])|(?P<control>[btnvfr]|0(?![0-9]))|(?P<itself>[^0-9A-Za-z]))",
    re.DOTALL,
)
_REFUSED = (
    (re.compile(r"\(\?<[=!]"), "a lookbehind"),
    (re.compile(r"\\[bB]"), "a word boundary"),
    (re.compile(r"\\[1-9k]"), "a back reference"),
    (re.compile(r"\(\?[a-z-]+[:)]"), "flags other than (?i) and (?s) at the beginning"),
)


class Node(NamedTuple):
    """A part of a pattern. `kind`: first, last, set, sequence, either, ahead, not ahead or repeat.

    `value`: the ranges of a set, or the minimum and maximum count of a repeat (None: no maximum).
    """

    kind: str
    parts: tuple[Node, ...] = ()
    value: Any = None

    @property
    def takes(self) -> bool:
        """Whether every match consumes at least one character."""
        if self.kind in ("sequence", "either"):
            return (any if self.kind == "sequence" else all)(part.takes for part in self.parts)
        return self.kind == "set" or (self.kind == "repeat" and self.value[0] > 0 and self.parts[0].takes)

    @property
    def void(self) -> bool:
        """Whether no match consumes a character."""
        if self.kind in ("sequence", "either", "repeat"):
            return (self.kind == "repeat" and self.value[1] == 0) or all(part.void for part in self.parts)
        return self.kind != "set"

    @property
    def context_free(self) -> bool:
        """Whether matches are independent of the surrounding text."""
        return self.kind not in ("first", "last", "ahead", "not ahead") and all(
            part.context_free for part in self.parts
        )


def read(pattern: str) -> Node:
    """Parse `pattern`. Raises ValueError if it is invalid or cannot be enforced, and RecursionError."""
    return _Reader(pattern).node()


class _Reader:
    def __init__(self, pattern: str) -> None:
        self._text = pattern
        self._at = 0
        flags = self._match(_LEADING_FLAGS)
        self._ignore_case = flags is not None and "i" in flags[1]
        self._dot = ((0, LAST),) if flags is not None and "s" in flags[1] else complement(_LINE_ENDS)

    def node(self) -> Node:
        node = self._alternatives()
        if self._at < len(self._text):
            self._fail("unmatched )")
        return node

    def _fail(self, problem: str) -> NoReturn:
        raise ValueError(f"is not a regular expression: {problem} at character {self._at}")

    def _match(self, token: re.Pattern[str]) -> re.Match[str] | None:
        found = token.match(self._text, self._at)
        self._at = found.end() if found else self._at
        return found

    def _take(self, text: str) -> bool:
        found = self._text.startswith(text, self._at)
        self._at += len(text) if found else 0
        return found

    def _alternatives(self) -> Node:
        branches = [self._sequence()]
        while self._take("|"):
            branches.append(self._sequence())
        return branches[0] if len(branches) == 1 else Node("either", tuple(branches))

    def _sequence(self) -> Node:
        parts = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            atom = self._atom()
            bounds = self._match(_QUANTIFIER)
            parts.append(Node("repeat", (atom,), self._bounds(*bounds.groups())) if bounds else atom)
        return Node("sequence", tuple(parts))

    def _bounds(self, sign: str | None, least: str, comma: str, most: str) -> tuple[int, int | None]:
        if sign:
            return (int(sign == "+"), 1 if sign == "?" else None)
        low = int(least or 0)
        high = int(most) if most else None if comma else low
        if high is not None and high < low:
            self._fail("a repetition's bounds in the wrong order")
        return low, high

    def _atom(self) -> Node:
        for token, name in _REFUSED:
            if token.match(self._text, self._at):
                raise ValueError(f"uses {name}, which cannot be enforced")
        if _QUANTIFIER.match(self._text, self._at):
            self._fail("nothing to repeat")
        if anchor := self._match(_ANCHOR):
            return Node("first" if anchor[1] else "last")
        if group := self._match(_GROUP):
            inner = self._alternatives()
            if not self._take(")"):
                self._fail("missing )")
            return Node("ahead" if group[1] == "=" else "not ahead", (inner,)) if group[1] else inner
        if self._take("("):
            self._fail("unknown kind of group")
        if self._take("."):
            return Node("set", value=self._dot)
        return Node("set", value=self._class() if self._take("[") else self._folded(self._characters()))

    def _class(self) -> Ranges:
        negated = self._take("^")
        members: list[tuple[int, int]] = []
        while not self._take("]"):
            low = self._characters()
            if self._text.startswith("-]", self._at) or not self._take("-"):
                members += low
                continue
            high = self._characters()
            ends = (low[0][0], high[0][0])
            if (*low, *high) != tuple((end, end) for end in ends):  # next to a class, the hyphen is literal
                members += (*low, (45, 45), *high)
            elif ends[0] > ends[1]:
                self._fail("a range in the wrong order")
            else:
                members.append(ends)
        ranges = self._folded(members)
        return complement(ranges) if negated else ranges

    def _characters(self) -> Ranges:
        """Return the characters that the next character or escape stands for."""
        found = self._match(_ESCAPE)
        if not found:
            if self._at == len(self._text) or self._text[self._at] == "\\":
                self._fail(f"bad escape {self._text[self._at :][:2]}" if self._at < len(self._text) else "missing ]")
            self._at += 1
            return ((ord(self._text[self._at - 1]),) * 2,)
        if kind := found["kind"]:
            return _CLASSES[kind] if kind in _CLASSES else complement(_CLASSES[kind.lower()])
        if found["property"]:
            name = found["name"]
            ranges = _PROPERTIES.get(name) or _category(_CATEGORIES.get(name, name))
            if not ranges:
                raise ValueError(f"uses \\p{{{name}}}, which is not supported")
            return ranges if found["property"] == "p" else complement(ranges)
        if found["high"]:
            pair = bytes.fromhex(found["high"] + found["low"]).decode("utf-16-be")
            return ((ord(pair), ord(pair)),)
        if digits := found["x"] or found["u"] or found["braced"] or found["U"]:
            code = int(digits, 16)
            if code > LAST:
                self._fail("a character above U+10FFFF")
            return ((code, code),)
        code = ord(found["letter"]) % 32 if found["letter"] else _CONTROLS.get(found["control"], ord(found[0][-1]))
        return ((code, code),)

    def _folded(self, ranges: Iterable[tuple[int, int]]) -> Ranges:
        """Return `ranges`, with (?i) including both cases of their ASCII letters."""
        ranges = merged(ranges)
        cases = (65, 97) if self._ignore_case else ()
        letters = [(max(low, case), min(high, case + 25)) for low, high in ranges for case in cases]
        return merged([*ranges, *((low ^ 32, high ^ 32) for low, high in letters if low <= high)])


@lru_cache
def _category(name: str) -> Ranges:
    """Return the characters whose general category begins with `name`; empty: there is no such category."""
    if not re.fullmatch("[LMNPSZ][a-z]?", name):
        return ()
    codes = (code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)).startswith(name))
    return merged((code, code) for code in codes)
