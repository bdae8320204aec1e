"""Test conversations, one for each kind that a chat template has to print. All are rendered when a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_PARAMETERS = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Tells the weather", "parameters": _PARAMETERS},
}
CLOCK: dict[str, Any] = {
    "type": "function",
    "function": {"name": "read_clock", "description": "", "parameters": {"type": "object", "properties": {}}},
}
_EVERY_TYPE: dict[str, Any] = {
    "text": {"type": "string", "description": "D-one"},
    "count": {"type": "integer", "minimum": 1, "default": 2},
    "share": {"type": "number"},
    "sure": {"type": "boolean"},
    "unit": {"enum": ["C", "F"]},
    "maybe": {"type": ["string", "null"]},
    "either": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
    "any": {},
    "list": {"type": "array"},
    "texts": {"type": "array", "items": {"type": "string"}},
    "map": {"type": "object"},
    "point": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]},
    "points": {"type": "array", "items": {"type": "object", "properties": {"y": {"type": "number"}}}},
}
SEARCH: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "search_all",
        "description": "Searches",
        "parameters": {"type": "object", "properties": _EVERY_TYPE, "required": ["text", "map"]},
    },
}


@dataclass(frozen=True, slots=True)
class Kind:
    """A test conversation, and the texts that its prompt must contain."""

    name: str
    messages: list[dict[str, Any]]
    tools: tuple[dict[str, Any], ...] = ()
    texts: tuple[str, ...] = ()
    variables: tuple[tuple[str, Any], ...] = ()


def _system(text: str = "S-one") -> dict[str, Any]:
    return {"role": "system", "content": text}


def _user(text: str = "U-one") -> dict[str, Any]:
    return {"role": "user", "content": text}


def _said(text: str = "A-one", **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def _call(number: int = 1, name: str = "get_weather", **arguments: Any) -> dict[str, Any]:
    return {"id": f"call0000{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def _invalid_call(arguments: str) -> dict[str, Any]:
    return {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def _result(number: int = 1, text: str = "R-one") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call0000{number}", "content": text}


_CALL_TURN = _said("", tool_calls=[_call(place="P-one")])
_PARALLEL_TURN = _said("", tool_calls=[_call(place="P-one"), _call(2, "read_clock"), _call(3, place="P-three")])

KINDS = (
    Kind("one question", [_user()], texts=("U-one",)),
    Kind("a system message", [_system(), _user()], texts=("S-one", "U-one")),
    Kind("a system message alone", [_system()], texts=("S-one",)),
    Kind("a developer message", [{"role": "developer", "content": "S-one"}, _user()], texts=("S-one", "U-one")),
    Kind("two system messages", [_system(), _system("S-two"), _user()], texts=("S-one", "S-two", "U-one")),
    Kind(
        "a system message later",
        [_user(), _said(), _system(), _user("U-two")],
        texts=("U-one", "A-one", "S-one", "U-two"),
    ),
    Kind("several turns", [_user(), _said(), _user("U-two")], texts=("U-one", "A-one", "U-two")),
    Kind(
        "several turns after a system message",
        [_system(), _user(), _said(), _user("U-two"), _said("A-two"), _user("U-three")],
        texts=("S-one", "U-one", "A-one", "U-two", "A-two", "U-three"),
    ),
    Kind("two questions in a row", [_user(), _user("U-two")], texts=("U-one", "U-two")),
    Kind("an assistant that begins", [_said(), _user()], texts=("A-one", "U-one")),
    Kind("two answers in a row", [_user(), _said(), _said("A-two"), _user("U-two")], texts=("A-one", "A-two", "U-two")),
    Kind("an empty system message", [_system(""), _user()], texts=("U-one",)),
    Kind("an empty answer", [_user(), _said(""), _user("U-two")], texts=("U-one", "U-two")),
    Kind("reasoning", [_user(), _said(reasoning_content="T-one"), _user("U-two")], texts=("U-one", "A-one", "U-two")),
    Kind("names", [{**_user(), "name": "N-one"}, _said(), _user("U-two")], texts=("U-one", "A-one", "U-two")),
    Kind("without thinking", [_user()], texts=("U-one",), variables=(("enable_thinking", False),)),
    Kind("tools", [_user()], (WEATHER, CLOCK), ("U-one", "get_weather", "read_clock")),
    Kind("tools and a system message", [_system(), _user()], (WEATHER,), ("S-one", "U-one", "get_weather")),
    Kind("parameters of every type", [_user()], (SEARCH,), ("U-one", "search_all")),
    Kind("a call", [_user(), _CALL_TURN, _result()], (WEATHER,), ("U-one", "P-one", "R-one")),
    Kind(
        "a call with text",
        [_user(), _said(tool_calls=[_call(place="P-one")]), _result(), _said("A-two"), _user("U-two")],
        (WEATHER,),
        ("U-one", "P-one", "R-one", "A-two", "U-two"),
    ),
    Kind(
        "parallel calls",
        [_user(), _PARALLEL_TURN, _result(), _result(2, "R-two"), _result(3, "R-three")],
        (WEATHER, CLOCK),
        ("P-one", "read_clock", "P-three", "R-one", "R-two", "R-three"),
    ),
    Kind(
        "a call with text and reasoning",
        [_user(), _said(tool_calls=[_call(place="P-one")], reasoning_content="T-one"), _result()],
        (WEATHER,),
        ("P-one", "R-one"),
    ),
    Kind(
        "calls one after the other, with reasoning",
        [
            _user(),
            {**_CALL_TURN, "reasoning_content": "T-one"},
            _result(),
            _said("", tool_calls=[_call(2, place="P-two")], reasoning_content="T-two"),
            _result(2, "R-two"),
            _said("A-two"),
            _user("U-two"),
        ],
        (WEATHER,),
        ("P-one", "R-one", "P-two", "R-two", "A-two", "U-two"),
    ),
    Kind(
        "a call whose arguments are not JSON",
        [_user(), _said("", tool_calls=[_invalid_call('{"place": "P-one')]), _result()],
        (WEATHER,),
        ("P-one", "R-one"),
    ),
    Kind("a result whose call is gone", [_user(), _result(), _user("U-two")], (WEATHER,), ("U-one", "R-one", "U-two")),
    Kind("a question after a call", [_user(), _CALL_TURN, _user("U-two")], (WEATHER,), ("U-one", "P-one", "U-two")),
    Kind("a question after a result", [_user(), _CALL_TURN, _result(), _user("U-two")], (WEATHER,), ("R-one", "U-two")),
    Kind("calls of tools that are gone", [_system(), _user(), _CALL_TURN, _result()], (), ("S-one", "P-one", "R-one")),
)
