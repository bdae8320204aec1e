"""`tool_choice`: which tools may or must be called, in the formats of OpenAI's two APIs and of other servers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Tag

from llamaherd_server.api.chat_fields import MAX_TOOLS, by_type, only_types
from llamaherd_server.api.fields import Body
from llamaherd_server.errors import ApiError, shown
from llamaherd_server.toolcalls.tools import Choice, Tool

_MODES = ("none", "auto", "required", "any")


class NamedChoice(Body):
    """The one tool to call. In a chat request, the name may be inside `function`."""

    type: Literal["function"]
    name: str


class AllowedChoice(Body):
    """The subset of tools that may be called. In a chat request, the fields may be inside `allowed_tools`."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedChoice], only_types("function")] = Field(max_length=MAX_TOOLS)


def _flat(choice: Any) -> Any:
    """Convert a chat request's nested object, and other servers' mode names, to the format of the Responses API."""
    if choice == "any":
        return "required"
    kind = choice.get("type") if isinstance(choice, dict) else None
    if not isinstance(kind, str):
        return choice
    if kind in _MODES:
        return _flat(kind)
    inner = choice.get(kind)
    flat = {**choice, **inner, "type": kind} if isinstance(inner, dict) else {**choice}
    if isinstance(inner, dict) and kind not in inner:
        del flat[kind]
    if isinstance(flat.get("tools"), list):
        flat["tools"] = [_flat(tool) for tool in flat["tools"]]
    return flat


Wanted = Literal["none", "auto", "required"] | NamedChoice | AllowedChoice | None
ToolChoice = Annotated[
    Annotated[
        Annotated[Literal["none", "auto", "required"], Tag("other")]
        | Annotated[NamedChoice, Tag("function")]
        | Annotated[AllowedChoice, Tag("allowed_tools")],
        by_type("function", "allowed_tools"),
    ]
    | None,
    BeforeValidator(_flat),
    Field(description="`required`, or one tool's name: enforced by grammar. Default: auto."),
]


def choice_of(tools: list[Tool], wanted: Wanted, *, parallel: bool | None) -> Choice:
    """Return the tools that may or must be called. Raises ApiError.

    `parallel` None: any number of calls, but only one if a call is required, because small models would never stop.
    """
    if isinstance(wanted, AllowedChoice):
        tools = [tool for one in wanted.tools for tool in _named(tools, one.name)]
        wanted = wanted.mode
    if wanted in (None, "auto"):
        return Choice(tools, parallel=parallel is not False)
    if wanted == "none":
        return Choice(())
    chosen = _named(tools, wanted.name) if isinstance(wanted, NamedChoice) else tools
    if not chosen:
        raise _invalid(f"{wanted!r} needs tools")
    return Choice(chosen, must=True, parallel=bool(parallel))


def _named(tools: list[Tool], name: str) -> list[Tool]:
    if found := [tool for tool in tools if tool.name == name]:
        return found
    available = ", ".join(tool.name for tool in tools)
    raise _invalid(f"unknown tool {shown(name)}; available: {available}" if tools else f"{shown(name)} needs tools")


def _invalid(what: str) -> ApiError:
    return ApiError(400, f"tool_choice: {what}", param="tool_choice", code="invalid_value")
