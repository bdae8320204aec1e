"""Finds the markers, channels and headers around an assistant's reasoning and text by rendering test turns."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import takewhile
from typing import Any, TypeAlias

import msgspec

from llamaherd_server.toolcalls.marks import MARK, UNIT, units
from llamaherd_server.toolcalls.reader import Reader

Print: TypeAlias = Callable[[list[dict[str, Any]], list[dict[str, Any]]], str]
"""Renders messages and tools as a prompt."""

QUESTION, ANSWER, RESULT, MORE = "the-question", "the-answer", "the-result", "the-next"
_THOUGHT = "the-thought"
USER: dict[str, Any] = {"role": "user", "content": QUESTION}
IDS = ("callN0001", "callN0002")
CALLS: list[tuple[str, dict[str, str]]] = [
    ("first_name", {"first_key": "first-value", "other_key": "other-value"}),
    ("other_name", {"first_key": "third-value", "other_key": "last-value"}),
]
_TEXT: dict[str, Any] = {"type": "string", "description": "A text"}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "A tool",
            "parameters": {"type": "object", "properties": dict.fromkeys(arguments, _TEXT), "required": [*arguments]},
        },
    }
    for name, arguments in CALLS
]


class Turn(msgspec.Struct, frozen=True):
    """Markers of an assistant's turn. `thinking`: around reasoning; None: none. `skipped`: around text, not part of it.

    `prompted`: text at the end of the prompt that the model has to write itself before a later call or text. `resumed`:
    what a template prints between reasoning and what follows it.
    """

    thinking: tuple[str, str] | None = None
    skipped: tuple[str, ...] = ()
    prompted: str = ""
    resumed: str = ""


def turn_of(printed: Print, thinking: tuple[str, str] | None) -> Turn:
    """Return the turn's markers. `thinking`: the markers around reasoning, if known."""
    try:
        begin, lead, end = around_answer(printed)
        resumed = ""
        if thinking is None and (found := _thinking(printed, begin)):
            thinking, resumed = found[0], found[1].removesuffix(lead.removeprefix(found[0][1])).strip()
    except ValueError:
        return Turn(thinking)
    stray: tuple[str, ...] = ()  # a marker printed although there is no reasoning
    for mark in thinking or ():
        if lead.strip().startswith(mark):
            lead, stray = lead.strip().removeprefix(mark), (mark,)
    if not lead.strip():
        return Turn(thinking, stray, resumed=resumed)
    if prompted := re.split(MARK, begin)[-1].strip(" \n") if re.search(r"[^\w\s]\Z", begin) else "":
        return Turn(thinking, (prompted + lead,), prompted, resumed)
    header = re.search(rf"{UNIT.pattern}[^<>\n]*\Z", begin.rstrip().removesuffix(thinking[0] if thinking else ""))
    first = lead.strip() if not UNIT.match(lead.strip()) else ""  # words before a mark
    texts = (first, *units(lead), *units(end), header[0] if header else "", resumed)
    skipped = (*stray, *(text for text in texts if text and units(lead)))
    return Turn(thinking, tuple(dict.fromkeys(skipped)), "", resumed)


def around_answer(printed: Print) -> tuple[str, str, str]:
    """Return how the prompt begins a turn, what else precedes the turn's text, and what separates it from the next."""
    begin = behind(printed([USER], []), QUESTION)
    said = printed([USER, {"role": "assistant", "content": ANSWER}, {**USER, "content": MORE}], [])
    lead, _, end = behind(said, QUESTION).partition(MORE)[0].partition(ANSWER)
    return begin, without_begin(lead, begin), end


def _thinking(printed: Print, begin: str) -> tuple[tuple[str, str], str] | None:
    """Return the markers around reasoning and the text after them; None if they do not read the reasoning back."""
    thought = {"role": "assistant", "content": ANSWER, "reasoning_content": _THOUGHT}
    call = {"id": IDS[0], "type": "function", "function": {"name": CALLS[0][0], "arguments": CALLS[0][1]}}
    called = {**thought, "content": "", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": IDS[0], "name": CALLS[0][0], "content": RESULT}
    for messages, tools in (([USER, thought], []), ([USER, called, result], TOOLS)):
        before, found, after = behind(printed(messages, tools), QUESTION).partition(_THOUGHT)
        own = before.removeprefix(begin).strip() if before.startswith(begin) else ""
        end = UNIT.match(after.partition(ANSWER)[0].lstrip())
        opening = own or (units(before) or [""])[-1]
        if not found or not end or not opening:
            continue
        after = after.lstrip().removeprefix(end[0])
        read = Reader(None, (opening, end[0]), False, {}).whole(f"{opening}{_THOUGHT}{end[0]}{ANSWER}")
        if (read.reasoning, read.content) == (_THOUGHT, ANSWER):
            return (opening, end[0]), after.partition(ANSWER)[0] if ANSWER in after else ""
    return None


def behind(text: str, last: str) -> str:
    """Return the text after the last occurrence of `last`. Raises ValueError if there is none."""
    return text[text.rindex(last) + len(last) :]


def without_begin(turn: str, begin: str) -> str:
    """Return the turn without `begin`, the end of its prompt, or without as much of that as the turn repeats."""
    if turn.startswith(begin):
        return turn[len(begin) :]
    ends = (begin[mark.start() :] for mark in MARK.finditer(begin))
    if header := next((end for end in ends if end in turn), ""):
        return turn.partition(header)[2]
    return turn[len(to_mark(common(turn, begin))) :]


def common(one: str, other: str) -> str:
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def to_mark(text: str) -> str:
    """Return the text without an incomplete mark at its end."""
    return text[: max(text.rfind(end) for end in ">]}\n") + 1]
