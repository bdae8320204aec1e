"""Calls of a template that is of no known family: what it prints around some is its format, if that reads them back.

A call may be a JSON object, a name before JSON arguments, or elements of text. llama.cpp goes by what a template prints
too (common/chat-auto-parser.h). What is printed in other ways has no format here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator
from functools import lru_cache
from itertools import takewhile
from typing import Any, Literal, TypeAlias

import msgspec

from llamaherd_server.grammar.gbnf import literal
from llamaherd_server.toolcalls import calls
from llamaherd_server.toolcalls.calls import Elements, Schemas
from llamaherd_server.toolcalls.formats import Format
from llamaherd_server.toolcalls.reader import Reader
from llamaherd_server.toolcalls.reply import Malformed, Source, Writer

Print: TypeAlias = Callable[[list[dict[str, Any]], list[dict[str, Any]]], str]
"""From messages and tools to a prompt."""

_ID = "\0"  # a call's id in what is printed
_ID_RULE = "[a-zA-Z0-9]{9}"
_MARK = re.compile(r"<[^<>\s]+>|\[[A-Z_/]+\]")
_OBJECT = re.compile(r'\{[^{}]*"(tool_)?name": ?"\Z')
_QUESTION, _ANSWER, _RESULT, _MORE = "the-question", "the-answer", "the-result", "the-next"
_IDS = ("callN0001", "callN0002")
_CALLS: list[tuple[str, dict[str, str]]] = [
    ("first_name", {"first_key": "first-value", "other_key": "other-value"}),
    ("other_name", {"first_key": "third-value", "other_key": "last-value"}),
]
_TEXT: dict[str, Any] = {"type": "string", "description": "A text"}
_TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "A tool",
            "parameters": {"type": "object", "properties": dict.fromkeys(arguments, _TEXT), "required": [*arguments]},
        },
    }
    for name, arguments in _CALLS
]


class Shape(msgspec.Struct, frozen=True):
    """What is printed before the first call, before and behind each name, behind each call's arguments, between calls
    (None: there is one call only) and after the last; of elements, around a parameter's name and behind its value."""

    kind: Literal["object", "named", "elements"]
    wrap: str
    opening: str
    middle: str
    closing: str
    between: str | None
    unwrap: str
    parameter: tuple[str, str] = ("", "")
    parameter_end: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        around = (self.wrap, self.opening, self.middle, self.closing, self.between or "", self.unwrap)
        return (*around, *self.parameter, self.parameter_end)


def shape_of(printed: Print) -> Shape | None:
    """What is around the calls of a template that is rendered by `printed`; None where that does not read them back."""
    try:
        shape, turn = _around(printed)
        message = Reader(form_of(shape), None, False, {}).whole(turn)
        read = [(one.name, json.loads(one.arguments)) for one in message.calls]
    except (ValueError, Malformed):
        return None
    wanted = _CALLS[:1] if shape.between is None else _CALLS
    return shape if read == wanted and not message.content else None


@lru_cache(maxsize=16)
def form_of(shape: Shape) -> Format:
    """Raises ValueError where nothing tells a call from a text."""
    before = (shape.wrap + shape.opening).lstrip()
    if shape.kind == "object":
        before = before.partition("{")[0]
    mark = _MARK.match(before)
    opens = mark[0] if mark else before.partition(_ID)[0].strip()
    if not opens or not (shape.middle.strip() or shape.kind == "object"):
        raise ValueError("nothing stands before a call, or behind its name")
    return Format(
        name="derived",
        signs=(),
        opens=opens,
        closes=shape.unwrap.strip(),
        body=_Body(shape, before.removeprefix(opens)).read,
        call_rule=lambda name, arguments: " ".join(
            (_rule(shape.opening), literal(name), _rule(shape.middle), arguments, _rule(shape.closing))
        ),
        joined=None if shape.between is None else _rule(shape.between),
        before=_rule(shape.wrap),
        after=_rule(shape.unwrap),
        elements=Elements(("", ""), "", shape.parameter, shape.parameter_end) if shape.kind == "elements" else None,
        tokens=tuple(dict.fromkeys(mark for text in shape.texts for mark in _MARK.findall(text))),
    )


class _Body:
    """Reads calls from behind `opens`, of what stands before the first of which `rest` is left; white space is free."""

    def __init__(self, shape: Shape, rest: str) -> None:
        self._shape = shape
        self._rest = rest
        opening = shape.opening.partition("{")[0] if shape.kind == "object" else shape.opening
        self._lead = re.split(rf"[\s{_ID}]", opening.lstrip())[0] or "{"
        self._tail = opening.lstrip().removeprefix(self._lead)
        closing = shape.closing.split()
        padding = "\n" if shape.parameter[1].endswith("\n") and shape.parameter_end.startswith("\n") else ""
        around = (shape.parameter, shape.parameter_end, padding)
        self._elements = Elements(("", shape.middle), "".join(closing[:1]), *around)

    def read(self, source: Source, writer: Writer, schemas: Schemas) -> Generator[None, None, None]:
        yield from _static(source, self._rest)
        while True:
            yield from self._call(source, writer, schemas)
            source.mark()  # what has been passed on is not content, whatever comes
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
            yield from calls.call_before(source, writer, shape.middle.strip())
        else:
            yield from self._elements.call_one(source, writer, schemas)
            closing = closing.partition(self._elements.call_end)[2]
        yield from _static(source, closing)


def _static(source: Source, text: str) -> Generator[None, None, None]:
    for word in text.split():
        before, is_id, behind = word.partition(_ID)
        yield from source.expect(before)
        if is_id:
            yield from calls.before(source, behind)


def _rule(text: str) -> str:
    return f" {_ID_RULE} ".join(map(literal, text.split(_ID)))


def _around(printed: Print) -> tuple[Shape, str]:
    """The shape, and the assistant's turn with calls that it is from. Raises ValueError where there is none."""
    user = {"role": "user", "content": _QUESTION}
    made: list[dict[str, Any]] = [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for call_id, (name, arguments) in zip(_IDS, _CALLS, strict=True)
    ]
    results = [
        {"role": "tool", "tool_call_id": one["id"], "name": one["function"]["name"], "content": _RESULT} for one in made
    ]
    turn = printed([user, {"role": "assistant", "content": "", "tool_calls": made}, *results], _TOOLS)
    turn = turn[turn.rindex(_QUESTION) + len(_QUESTION) :].partition(_RESULT)[0]
    for call_id in _IDS:
        turn = turn.replace(call_id, _ID)
    said = [user, {"role": "assistant", "content": _ANSWER}, {**user, "content": _MORE}]
    end = printed(said, []).partition(_ANSWER)[2].partition(_MORE)[0]
    begin = printed([user], []).partition(_QUESTION)[2]
    turn = turn[len(begin if turn.startswith(begin) else _to_mark(_common(turn, begin))) :]
    turn = re.sub(r"\A\s*(<think>)?\s*</think>\s*", "", turn)

    kind: Literal["object", "named", "elements"]
    kind, name_at, middle, parameter, parameter_end, over = _call_in(turn, 0, *_CALLS[0])
    before = turn[:name_at]
    if (second := turn.find(_CALLS[1][0], over)) < 0:
        wrap, opening, between, unwrap = "", before, None, ""
        closing = _until(turn[over:], end)
    else:
        last = _call_in(turn, over, *_CALLS[1])[-1]
        gap, tail = turn[over:second], turn[last:]
        opening = _from_mark(_common_end(before, gap))
        wrap, gap = before[: len(before) - len(opening)], gap[: len(gap) - len(opening)]
        closing = _to_mark(_common(gap, tail))
        between, unwrap, over = gap[len(closing) :], _until(tail[len(closing) :], end), last
    if _OBJECT.search(opening) and middle.startswith('"'):
        kind = "object"
    closing = closing.removeprefix(parameter_end)
    shape = Shape(kind, wrap, opening, middle, closing, between, unwrap, parameter, parameter_end)
    if any(text in part for name, arguments in _CALLS for text in (name, *arguments) for part in shape.texts):
        raise ValueError("a name stands in more than one place")
    return shape, turn[:over] + parameter_end + closing + unwrap


def _call_in(
    turn: str, start: int, name: str, arguments: dict[str, str]
) -> tuple[Literal["named", "elements"], int, str, tuple[str, str], str, int]:
    """Its kind, where its name is, what is behind that, around parameters and behind them, and where it is over."""
    at = turn.index(name, start)
    behind = at + len(name)
    for brace in [found.start() for found in re.finditer("{", turn[behind:])]:
        try:
            found, length = json.JSONDecoder().raw_decode(turn[behind + brace :])
        except ValueError:
            continue
        if found == arguments:
            return "named", at, turn[behind : behind + brace], ("", ""), "", behind + brace + length
    places = []
    for text in [one for pair in arguments.items() for one in pair]:
        places.append((turn.index(text, behind), turn.index(text, behind) + len(text)))
        behind = places[-1][1]
    head, key_end = turn[at + len(name) : places[0][0]], turn[places[0][1] : places[1][0]]
    gap = turn[places[1][1] : places[2][0]]
    start_of = _from_mark(_common_end(head, gap))
    parameter_end = gap[: len(gap) - len(start_of)]
    return "elements", at, head[: len(head) - len(start_of)], (start_of, key_end), parameter_end, behind


def _until(text: str, end: str) -> str:
    """The text as far as it is not how a turn ends."""
    length = next((length for length in range(len(end), 0, -1) if end[:length] in text), 0)
    return text[: text.index(end[:length])] if length else text


def _common(one: str, other: str) -> str:
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _common_end(one: str, other: str) -> str:
    return _common(one[::-1], other[::-1])[::-1]


def _from_mark(text: str) -> str:
    """Without the end of another mark."""
    found = re.search(r"[<{\[]", text)
    return text[found.start() :] if found else ""


def _to_mark(text: str) -> str:
    """Without the beginning of another mark."""
    return text[: max(text.rfind(end) for end in ">]}\n") + 1]
