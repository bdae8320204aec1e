"""Derives the call format of a template of no known family from how it prints test calls, if that reads them back.

A call may be a JSON object, a name followed by JSON arguments, or elements with text. Other formats are not supported.
llama.cpp derives formats from printed calls, too (common/chat-auto-parser.h).
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from functools import lru_cache, reduce
from typing import Any, Literal, NamedTuple

import msgspec

from llamaherd_server.grammar.gbnf import literal
from llamaherd_server.toolcalls import calls
from llamaherd_server.toolcalls.calls import Schemas
from llamaherd_server.toolcalls.elements import Elements
from llamaherd_server.toolcalls.formats import Format
from llamaherd_server.toolcalls.marks import ID, KEY, MARK, NAME, NUMBER, UNIT, units
from llamaherd_server.toolcalls.reader import Reader
from llamaherd_server.toolcalls.reply import Malformed, Source, Writer
from llamaherd_server.toolcalls.turns import (
    CALLS,
    IDS,
    QUESTION,
    RESULT,
    TOOLS,
    USER,
    Print,
    Turn,
    around_answer,
    behind,
    common,
    to_mark,
    without_begin,
)

_ID_RULE, _NUMBER_RULE = "[a-zA-Z0-9]{9}", "[0-9]{1,3}"
_START = re.compile(rf"{UNIT.pattern}|[<{{\[]")
_OBJECT = re.compile(r'\{[^{}]*"(tool_)?name": ?"\Z')
_LATER = re.compile(rf"{UNIT.pattern}|[^<>\[\]\n]+(?:{MARK.pattern})")  # words before a mark, too
# A value of each type, and a pattern for how templates print it.
_VALUES: dict[str, tuple[Any, str]] = {
    "string": ("a-text", "a-text"),
    "number": (17, "17"),
    "boolean": (True, "[Tt]rue"),
    "null": (None, "null|None"),
    "array": ([18], r"\[18\]"),
    "object": ({"in": 19}, r"\{.in.: ?19\}"),
}


class Shape(msgspec.Struct, frozen=True):
    """What a template prints before the first call (`wrap`), before and after its name (`opening`, `middle`), after its
    arguments (`closing`), between calls (`between`; None: it prints only one) and after the last one (`unwrap`).

    `opens`: the marker that a reader looks for; `skipped`: the text before it; `prompted`: the part of a call's start
    that the prompt already contains. The other fields are those of Elements.
    """

    kind: Literal["object", "named", "elements"]
    wrap: str
    opening: str
    middle: str
    closing: str
    between: str | None
    unwrap: str
    parameter: tuple[str, str] = ("", "")
    parameter_end: str = ""
    opens: str = ""
    skipped: tuple[str, ...] = ()
    prompted: str = ""
    types: tuple[tuple[str, str], ...] = ()
    typed: str = ""
    item: str = ""
    quotes: tuple[str, str] = ("", "")

    @property
    def texts(self) -> tuple[str, ...]:
        around = (self.wrap, self.opening, self.middle, self.closing, self.between or "", self.unwrap)
        return (*around, *self.parameter, self.parameter_end)


def shape_of(printed: Print, turn: Turn) -> Shape | None:
    """Return the shape of the calls that `printed` renders; None if a reader for it does not read them back."""
    try:
        shape, text = _around(printed, turn)
        form = form_of(shape)
        schemas: dict[str, object] = {name: {} for name, _ in CALLS}
        reader = Reader(form, turn.thinking, False, schemas, True, (*turn.skipped, *shape.skipped), shape.prompted)
        message = reader.whole(text)
        read = [(one.name, json.loads(one.arguments)) for one in message.calls]
    except (ValueError, Malformed):
        return None
    wanted = CALLS[:1] if shape.between is None else CALLS
    return shape if read == wanted and not message.content.strip() else None


@lru_cache(maxsize=16)
def form_of(shape: Shape) -> Format:
    """Return the format of a shape. Raises ValueError if nothing distinguishes a call from text."""
    if not shape.opens or not (shape.middle.strip(" ") or shape.kind == "object"):
        raise ValueError("nothing stands before a call, or behind its name")
    before = shape.wrap + shape.opening
    body = _Body(shape, "" if shape.prompted else before[before.index(shape.opens) + len(shape.opens) :])
    return Format(
        name="derived",
        signs=(),
        opens=shape.opens,
        closes=shape.unwrap.strip(),
        body=body.read,
        call_rule=lambda name, arguments: " ".join(
            (_rule(shape.opening, name), literal(name), _rule(shape.middle), arguments, _rule(shape.closing))
        ),
        joined=None if shape.between is None else _rule(shape.between),
        before=_wrap_rule(shape),
        after=_rule(shape.unwrap),
        elements=body.elements if shape.kind == "elements" else None,
        tokens=tuple(dict.fromkeys(mark for text in shape.texts for mark in MARK.findall(text))),
    )


class _Body:
    """Reads calls after the marker `opens`; `rest` is the text between it and the first name. Ignores white space."""

    def __init__(self, shape: Shape, rest: str) -> None:
        self._shape = shape
        self._rest = rest.partition("{")[0] if shape.kind == "object" else rest
        opening = shape.opening.partition("{")[0] if shape.kind == "object" else shape.opening
        self._lead = re.split(rf"[\s{ID}{NUMBER}]", opening.lstrip())[0] or "{"
        self._tail = opening.lstrip().removeprefix(self._lead)
        closing = shape.closing.split()
        padding = "\n" if shape.parameter[1].endswith("\n") and shape.parameter_end.startswith("\n") else ""
        around = (shape.parameter, shape.parameter_end, padding, shape.types, shape.typed, shape.item, shape.quotes)
        self.elements = Elements(("", shape.middle), "".join(closing[:1]), *around)

    def read(self, source: Source, writer: Writer, schemas: Schemas) -> Generator[None, None, None]:
        yield from _static(source, self._rest)
        while True:
            yield from self._call(source, writer, schemas)
            source.mark()  # a call already emitted never becomes content
            if NAME in self._shape.opening or self._shape.prompted:  # each call has its own `opens`
                return
            yield from source.spaces()
            if between := (self._shape.between or "").strip():
                yield from source.literal(between)
                yield from source.spaces()
            if self._lead == "{":
                if not source.rest.startswith("{"):
                    return
            elif not (yield from source.literal(self._lead)):
                return
            yield from _static(source, self._tail)

    def _call(self, source: Source, writer: Writer, schemas: Schemas) -> Generator[None, None, None]:
        shape, closing = self._shape, self._shape.closing
        if shape.kind == "object":
            yield from calls.json_call(source, writer, schemas)
            closing = closing.partition("}")[2]
        elif shape.kind == "named":
            marks = [mark.strip() or mark for mark in re.split(f"[{ID}{NUMBER}]", shape.middle)]
            known = None if MARK.search(shape.opens) else schemas  # text may contain `opens` if it is no mark
            yield from calls.call_before(source, writer, marks, known)
        else:
            yield from self.elements.call_one(source, writer, schemas)
            closing = closing.partition(self.elements.call_end)[2]
        yield from _static(source, closing)


def _static(source: Source, text: str) -> Generator[None, None, None]:
    for word in text.split():
        before, *others = re.split(f"[{ID}{NUMBER}]", word)
        yield from source.expect(before)
        for one in others:
            yield from calls.before(source, one)


def _rule(text: str, name: str = "") -> str:
    rules = {ID: _ID_RULE, NUMBER: _NUMBER_RULE}
    parts = re.split(f"([{ID}{NUMBER}])", text.replace(NAME, name))
    return " ".join(rules.get(part) or literal(part) for part in parts if part) or '""'


def _wrap_rule(shape: Shape) -> str:
    """Return the rule for `wrap`. Marks before `opens` are optional, because the prompt may already contain them."""
    lead, opens, rest = shape.wrap.partition(shape.opens)
    if not opens or "".join(units(lead)) != lead:
        return _rule(shape.wrap)
    return " ".join((*(f"({literal(unit)})?" for unit in units(lead)), _rule(opens + rest)))


def _around(printed: Print, turn: Turn) -> tuple[Shape, str]:
    """Return the shape and the printed calls that it was derived from. Raises ValueError if there is no shape."""
    begin, lead, end = around_answer(printed)
    text = without_begin(_called(printed, *CALLS), begin)
    for mark in turn.thinking or ("<think>", "</think>"):
        text = text.lstrip().removeprefix(mark) if text.lstrip().startswith(mark) else text

    first = _call_in(text, 0, *CALLS[0])
    before, over, prompted = text[: first.at].replace(CALLS[0][0], NAME), first.over, ""
    between: str | None = None
    if (second_at := text.find(CALLS[1][0], over)) < 0:
        wrap, opening, middle, unwrap = "", before, first.middle, ""
        closing = _until(text[over:], end)
    else:
        second = _call_in(text, second_at, *CALLS[1])
        middle = _with_number(first.middle, second.middle)
        last_key = [*CALLS[0][1]][-1]
        gap, tail = (one.replace(last_key, KEY) for one in (text[over : second.at], text[second.over :]))
        gap = gap.replace(CALLS[1][0], NAME)
        if turn.prompted and not before and gap.endswith(turn.prompted):
            prompted = turn.prompted
        opening = _common_end(before, gap) if gap.endswith(before) else _from_mark(before, gap)
        wrap, gap = before[: len(before) - len(opening)], gap[: len(gap) - len(opening)]
        closing = to_mark(common(gap.removesuffix(prompted), tail))
        between, unwrap, over = gap[len(closing) :], _until(tail[len(closing) :], end), second.over
    kind = "object" if _OBJECT.search(opening) and middle.startswith('"') else first.kind
    closing = closing.removeprefix(first.parameter_end)
    opens, skipped = _opens(wrap + opening, kind, begin + lead + end, turn)
    if skipped and between:
        skipped = (*skipped, between.strip())
    around = (first.parameter, first.parameter_end, prompted or opens, skipped, prompted)
    shape = Shape(kind, wrap, opening, middle, closing, between, unwrap, *around)
    if any(one in part for name, arguments in CALLS for one in (name, *arguments) for part in shape.texts):
        raise ValueError("a name stands in more than one place")
    if kind == "elements":
        shape = _quoted(printed, _typed(printed, shape))
    return shape, text[:over] + first.parameter_end.replace(KEY, [*CALLS[-1][1]][-1]) + closing + unwrap


def _called(printed: Print, *made: tuple[str, dict[str, Any]]) -> str:
    """Return a printed turn with these calls, from after the question to the first result."""
    calls_ = [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for call_id, (name, arguments) in zip(IDS, made, strict=False)
    ]
    results = [
        {"role": "tool", "tool_call_id": call_id, "name": name, "content": RESULT}
        for call_id, (name, _) in zip(IDS, made, strict=False)
    ]
    asked = {"role": "assistant", "content": "", "tool_calls": calls_}
    text = behind(printed([USER, asked, *results], TOOLS), QUESTION).partition(RESULT)[0]
    for call_id in IDS:
        text = text.replace(call_id, ID)
    return text


class _Call(NamedTuple):
    """A printed call: the offset of its name, the texts around name and parameters as in Shape, and its end offset."""

    kind: Literal["object", "named", "elements"]
    at: int
    middle: str
    parameter: tuple[str, str]
    parameter_end: str
    over: int


def _call_in(turn: str, start: int, name: str, arguments: dict[str, str]) -> _Call:
    keys = [*arguments]
    at = turn.rindex(name, start, turn.index(keys[0], start))
    over = at + len(name)
    for brace in [found.start() for found in re.finditer("{", turn[over:])]:
        try:
            found, length = json.JSONDecoder().raw_decode(turn[over + brace :])
        except ValueError:
            continue
        if found == arguments:
            return _Call("named", at, turn[over : over + brace], ("", ""), "", over + brace + length)
    places = []
    for text in [one for pair in arguments.items() for one in pair]:
        places.append((turn.index(text, over), turn.index(text, over) + len(text)))
        over = places[-1][1]
    head, key_end = turn[at + len(name) : places[0][0]], turn[places[0][1] : places[1][0]]
    gap = turn[places[1][1] : places[2][0]].replace(keys[0], KEY)
    start_of = _from_mark(head, gap)
    parameter_end = gap[: len(gap) - len(start_of)]
    return _Call("elements", at, head[: len(head) - len(start_of)], (start_of, key_end), parameter_end, over)


def _opens(before: str, kind: str, plain: str, turn: Turn) -> tuple[str, tuple[str, ...]]:
    """Return the first marker that only turns with calls contain, and the text before it. Raises ValueError."""
    known = (plain, *(turn.thinking or ()), turn.resumed)
    shown = before.partition("{")[0] if kind == "object" else before
    at = shown.rfind(NAME) + 1
    while unit := (_LATER if at else UNIT).match(shown, len(shown) - len(shown[at:].lstrip())):
        mark = MARK.match(unit[0])
        for one in (mark[0] if mark else "", unit[0]):
            if one and not any(one in text for text in known):
                skipped = shown[: unit.start()].strip()
                return one, (skipped,) if NAME in skipped else tuple(units(skipped))
        at = unit.end()
    if NAME in before or at:
        raise ValueError("nothing tells a call from a text")
    return re.split(f"[{ID}{NUMBER}]", shown)[0].strip(), ()


def _typed(printed: Print, shape: Shape) -> Shape:
    """Return the shape with the template's way of marking the types of parameters, if it has one."""
    begin, behind_key = shape.parameter
    text = _called(printed, (CALLS[0][0], {f"{kind}_key": value for kind, (value, _) in _VALUES.items()}))
    tails, item = {}, ""
    for kind, (_, pattern) in _VALUES.items():
        rest = text.partition(f"{begin}{kind}_key")[2].partition(shape.parameter_end.partition(KEY)[0].strip())[0]
        found = re.search(rf"({pattern})\s*\Z", rest)
        tails[kind] = rest[: found.start()] if found else behind_key
        if kind == "array" and rest.startswith(behind_key + begin):
            item = rest.removeprefix(behind_key + begin).partition(behind_key)[0]
            tails[kind] = behind_key
        elif kind == "object" and rest.startswith(behind_key + begin):
            tails[kind] = behind_key
    words = list(tails.values())
    if len(set(words)) == 1:
        return msgspec.structs.replace(shape, item=item)
    head, end = re.sub(r"\w+\Z", "", reduce(common, words)), re.sub(r"\A\w+", "", reduce(_common_end, words))
    if not head or not end:
        raise ValueError("nothing tells a parameter's type from its name")
    types = tuple((kind, tail[len(head) : -len(end)]) for kind, tail in tails.items())
    return msgspec.structs.replace(shape, parameter=(begin, head), types=types, typed=end, item=item)


def _quoted(printed: Print, shape: Shape) -> Shape:
    """Return the shape with the quotes that the template prints around text with markup, if any."""
    value = "a <b> & c"
    rest = _called(printed, (CALLS[0][0], {"text_key": value})).partition(f"{shape.parameter[0]}text_key")[2]
    for part in (*shape.parameter[1:], dict(shape.types).get("string", ""), shape.typed):
        rest = rest.removeprefix(part)
    left, found, rest = rest.partition(value)
    right = rest.partition(shape.parameter_end.partition(KEY)[0])[0]
    return msgspec.structs.replace(shape, quotes=(left, right)) if found and left.strip() and right.strip() else shape


def _with_number(one: str, other: str) -> str:
    """Return `one`, with numbers replaced by NUMBER if they are the only difference, because these count calls."""
    counted = re.sub(r"\d+", NUMBER, one)
    return counted if one != other and counted == re.sub(r"\d+", NUMBER, other) else one


def _until(text: str, end: str) -> str:
    """Return the text before the end of the turn."""
    if unit := next((unit for unit in UNIT.finditer(text) if unit[0] in units(end)), None):
        return text[: unit.start()]
    length = next((length for length in range(len(end), 0, -1) if end[:length] in text), 0)
    return text[: text.index(end[:length])] if length else text


def _common_end(one: str, other: str) -> str:
    return common(one[::-1], other[::-1])[::-1]


def _from_mark(one: str, other: str) -> str:
    """Return the longest common ending that begins with a mark or bracket in both texts."""
    starts = [{len(text) - found.start() for found in _START.finditer(text)} for text in (one, other)]
    length = max((at for at in starts[0] & starts[1] if one[-at:] == other[-at:]), default=0)
    return one[len(one) - length :]
