"""A regular expression of a JSON schema as a language: ECMA-262's, as far as Python's parser reads it too."""

from __future__ import annotations

import re
import sys
import unicodedata
import warnings
from collections.abc import Iterable
from functools import lru_cache
from re import _constants as ops  # type: ignore[attr-defined]  # re has no public parser
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from llamaherd_server.grammar.language import Term, Terms
from llamaherd_server.grammar.ranges import Ranges, complement, merged

MAX_LENGTH = 4000
_LINE_ENDS: Ranges = ((10, 10), (13, 13), (0x2028, 0x2029))
# ECMA-262's classes, which JSON Schema means, are ASCII but for white space.
_CLASSES: dict[Any, Ranges] = {
    ops.CATEGORY_DIGIT: ((48, 57),),
    ops.CATEGORY_WORD: ((48, 57), (65, 90), (95, 95), (97, 122)),
    ops.CATEGORY_SPACE: (
        *((9, 13), (0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029)),
        *((0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000)),
    ),
}
_NEGATED = {
    ops.CATEGORY_NOT_DIGIT: ops.CATEGORY_DIGIT,
    ops.CATEGORY_NOT_WORD: ops.CATEGORY_WORD,
    ops.CATEGORY_NOT_SPACE: ops.CATEGORY_SPACE,
}
# Python has no emoji in its Unicode tables: blocks that consist of them.
_EMOJI = "\U0001f300-\U0001f321\U0001f330-\U0001f393\U0001f600-\U0001f64f\U0001f680-\U0001f6c5\U0001f90c-\U0001f93a"
_FLAGS = "\U0001f1e6-\U0001f1ff"
_PROPERTIES = {
    "Extended_Pictographic": _EMOJI,
    "Emoji_Presentation": _EMOJI,
    "Emoji": _EMOJI,
    "Regional_Indicator": _FLAGS,
    "Emoji_Component": f"#*0-9\u200d\u20e3\ufe0f{_FLAGS}\U0001f3fb-\U0001f3ff",
}
_CATEGORIES = {"Letter": "L", "Alphabetic": "L", "Number": "N", "Punctuation": "P", "Symbol": "S", "Separator": "Z"} | {
    "Uppercase_Letter": "Lu", "Lowercase_Letter": "Ll", "Uppercase": "Lu", "Lowercase": "Ll", "Decimal_Number": "Nd",
    "Mark": "M",
}  # fmt: skip
_AT_BEGINNING = (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING)
_AT_END = (ops.AT_END, ops.AT_END_STRING)
# What ECMA-262 writes in another way than Python does, and what decides whether it stands within a class.
_TOKEN = re.compile(
    r"(?P<hyphen>\\[dDwWsS]-(?!\]))|\\(?P<kind>[pP])\{(?:General_Category=|gc=)?(?P<property>\w+)\}|\\u\{(?P<code>[0-9A-Fa-f]{1,6})\}|\\c(?P<control>[A-Za-z])"
    r"|(?P<name>\(\?<)(?![=!])|(?P<any>\[\^\])|\\.|(?P<open>\[\^?\]?)|(?P<close>\])",
    re.DOTALL,
)


def language_of(terms: Terms, pattern: Any) -> Term:
    """The texts in which `pattern` is found; raises ValueError for what cannot be read, or is not regular."""
    if not isinstance(pattern, str) or len(pattern) > MAX_LENGTH:
        raise ValueError(f"must be a text of at most {MAX_LENGTH} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of sets within sets, which ECMA-262 has not
            parsed = parser.parse(_as_python(pattern))
    except (parser.error, OverflowError) as error:
        raise ValueError(f"is not a regular expression: {error}") from None
    translator = _Translator(terms, ignore_case=bool(parsed.state.flags & re.IGNORECASE))
    later = terms.sequence(terms.any, terms.all, translator.sequence(parsed, terms.all, first=False))
    return terms.either(translator.sequence(parsed, terms.all, first=True), later)


def _as_python(pattern: str) -> str:
    inside = False

    def translated(match: re.Match[str]) -> str:  # noqa: PLR0911 (one return for each kind)
        nonlocal inside
        if match["hyphen"] and inside:
            return f"{match['hyphen'][:2]}\\-"
        if match["property"]:
            return _property(match["property"], negated=match["kind"] == "P", inside=inside)
        if match["code"]:
            return f"\\U{int(match['code'], 16):08x}"
        if match["control"]:
            return f"\\x{ord(match['control']) % 32:02x}"
        if match["any"] and not inside:
            return r"[\s\S]"
        if match["open"] and not inside:
            inside = True
            return "(?!)" if match["open"] == "[]" else match["open"]
        if match["name"]:
            return match["name"] if inside else "(?P<"
        inside = inside and not match["close"]
        return f"\\{match[0]}" if match["open"] else match[0]

    return _TOKEN.sub(translated, pattern)


def _property(name: str, *, negated: bool, inside: bool) -> str:
    text = _PROPERTIES.get(name) or _category(_CATEGORIES.get(name, name))
    if not text:
        raise ValueError(f"uses \\p{{{name}}}, which is not supported")
    if negated and inside:
        raise ValueError(f"uses \\P{{{name}}} within a class, which is not supported")
    return text if inside else f"[{'^' if negated else ''}{text}]"


@lru_cache
def _category(name: str) -> str:
    """The characters whose general category begins with `name`, as the inside of a class."""
    if not re.fullmatch("[LMNPSZ][a-z]?", name):
        return ""
    codes = (code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)).startswith(name))
    return "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in merged((code, code) for code in codes))


class _Translator:
    """`then` is what may follow; `first`: whether this is the text's beginning, None: it may be or not."""

    def __init__(self, terms: Terms, *, ignore_case: bool) -> None:
        self._terms = terms
        self._ignore_case = ignore_case

    def sequence(self, items: Any, then: Term, *, first: bool | None) -> Term:
        begins = []
        for item in items:
            begins.append(first)
            least, most = parser.SubPattern(items.state, [item]).getwidth()
            first = False if least or first is False else first if most == 0 else None
        for (op, argument), begin in reversed(list(zip(items, begins, strict=True))):
            then = self._item(op, argument, then, begin)
        return then

    def _item(self, op: Any, argument: Any, then: Term, first: bool | None) -> Term:  # noqa: PLR0911 (one return for each kind)
        terms = self._terms
        if op in (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN):
            return terms.sequence(terms.chars(self._set(op, argument)), then)
        if op is ops.BRANCH:
            return terms.either(*(self.sequence(branch, then, first=first) for branch in argument[1]))
        if op is ops.SUBPATTERN and not argument[1] and not argument[2]:  # without flags of its own
            return self.sequence(argument[3], then, first=first)
        if op in (ops.MAX_REPEAT, ops.MIN_REPEAT):
            return self._repeat(argument, then, first)
        if op is ops.AT and argument in _AT_BEGINNING and first is not None:
            return then if first else terms.nothing
        if op is ops.AT and argument in _AT_END:
            return terms.empty if then.nullable else terms.nothing
        if op in (ops.ASSERT, ops.ASSERT_NOT) and argument[0] > 0:
            ahead = self.sequence(argument[1], terms.all, first=first)
            return terms.both(then, ahead if op is ops.ASSERT else terms.other(ahead))
        if op is ops.FAILURE:
            return terms.nothing
        raise ValueError(f"uses {str(op if op is not ops.AT else argument).lower()}, which cannot be enforced")

    def _repeat(self, argument: tuple[int, Any, Any], then: Term, first: bool | None) -> Term:
        terms, (low, high, repeated) = self._terms, argument
        if (low, high) == (0, 1):
            return terms.either(then, self.sequence(repeated, then, first=first))
        if not _context_free(repeated):
            raise ValueError("repeats an anchor or a lookahead, which cannot be enforced")
        once = self.sequence(repeated, terms.empty, first=None)
        return terms.sequence(terms.repeat(once, low, None if high is ops.MAXREPEAT else high), then)

    def _set(self, op: Any, argument: Any) -> Ranges:
        if op is ops.ANY:
            return complement(_LINE_ENDS)
        members = [(ops.LITERAL, argument)] if op in (ops.LITERAL, ops.NOT_LITERAL) else argument
        ranges: list[tuple[int, int]] = []
        for kind, value in members:
            if kind is ops.LITERAL:
                ranges.append((value, value))
            elif kind is ops.RANGE:
                ranges.append(value)
            elif kind is ops.CATEGORY:
                ranges += complement(_CLASSES[_NEGATED[value]]) if value in _NEGATED else _CLASSES[value]
        if self._ignore_case:
            letters = [(low, high, case) for low, high in ranges for case in (65, 97)]
            ranges += [
                (max(low, case) ^ 32, min(high, case + 25) ^ 32)
                for low, high, case in letters
                if max(low, case) <= min(high, case + 25)
            ]
        return complement(ranges) if op is ops.NOT_LITERAL or (ops.NEGATE, None) in members else merged(ranges)


def _context_free(items: Iterable[Any]) -> bool:
    """Whether what the items match depends on nothing around them."""
    for op, argument in items:
        if op in (ops.AT, ops.ASSERT, ops.ASSERT_NOT):
            return False
        inner: list[Any] = []
        if op is ops.BRANCH:
            inner = argument[1]
        elif op is ops.SUBPATTERN:
            inner = [argument[3]]
        elif op in (ops.MAX_REPEAT, ops.MIN_REPEAT):
            inner = [argument[2]]
        if not all(map(_context_free, inner)):
            return False
    return True
