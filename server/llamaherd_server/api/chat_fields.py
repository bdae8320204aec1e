"""The parts of a chat request: messages, tools, the form of the answer."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from llamaherd_server.api.fields import Body
from llamaherd_server.chat.tools import Choice, Tool
from llamaherd_server.errors import ApiError, unsupported

MOST_TOOLS = 128
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


def _joined(content: Any) -> Any:
    """Content parts as one text, joined by line ends as llama.cpp does."""
    if not isinstance(content, list):
        return content
    for part in content:
        if isinstance(part, dict) and part.get("type", "text") not in ("text", "refusal"):
            raise unsupported("messages", f"messages: content of type {part['type']!r} is not supported: send text")
    return "\n".join(TextPart.model_validate(part).text for part in content)


class CalledFunction(Body):
    """What was called."""

    name: Name
    arguments: str = Field(description="A JSON object, as text.")


class ToolCall(Body):
    """A call that the model made."""

    id: str = Field(min_length=1, max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """One turn of a chat."""

    role: str = Field(min_length=1, max_length=64, description="As the model's chat template knows it.")
    content: Annotated[str | None, BeforeValidator(_joined, json_schema_input_type=str | list[TextPart] | None)] = (
        Field(None, description="Text, or parts of type `text`, joined by line ends. Not needed beside calls.")
    )
    name: str | None = Field(None, max_length=256, description="Given to the chat template.")
    tool_calls: list[ToolCall] | None = Field(None, max_length=MOST_TOOLS, description="Calls made in this turn.")
    tool_call_id: str | None = Field(None, max_length=256, description="Whose result this turn is.")
    reasoning_content: str | None = Field(None, description="Given to the chat template.")
    refusal: None = Field(None, description="Only null.")
    annotations: list[Any] | None = Field(None, max_length=0, description="Only an empty list.")
    audio: None = Field(None, description="Only null.")
    function_call: None = Field(None, description="Only null: see `tool_calls`.")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing: only a message with tool_calls may leave it out")
        if self.tool_calls and self.role != "assistant":
            raise ValueError('tool_calls belong to the role "assistant"')
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError('a message of the role "tool" needs tool_call_id')
        return self

    def for_template(self) -> dict[str, Any]:
        """As transformers' templates expect it: the arguments of calls as objects."""
        message = self.model_dump(exclude_none=True, exclude={"annotations"})
        message.setdefault("content", "")
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = arguments_object(call["function"]["arguments"])
        return message


def arguments_object(arguments: str) -> Any:
    """A call's arguments as templates expect them."""
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        return arguments  # what a model wrote and a client sent back, broken as it is


class Function(Body):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema; left out: no parameters.")
    strict: bool | None = Field(None, description="True: calls always follow the schema, also with tool_choice auto.")


class ToolField(Body):
    """A tool of the request."""

    type: Literal["function"]
    function: Function

    def tool(self) -> Tool:
        function = self.function
        return Tool(function.name, function.description, function.parameters, bool(function.strict))


class NamedFunction(Body):
    """A tool's name."""

    name: str


class NamedChoice(Body):
    """The one tool to call."""

    type: Literal["function"]
    function: NamedFunction


def choice_of(tools: list[Tool], wanted: str | None, *, parallel: bool | None) -> Choice:
    """The tools in play; `wanted`: none, auto, required, or a tool's name after an equals sign. Raises ApiError.

    `parallel` None: as many calls as the model likes, but one where it must call, as small models never stop there.
    """
    if wanted in (None, "auto"):
        return Choice(tools, parallel=parallel is not False)
    if wanted == "none":
        return Choice(())
    name = (wanted or "").removeprefix("=")
    chosen = tools if wanted == "required" else [tool for tool in tools if tool.name == name]
    if not chosen:
        what = f"names {name!r}, which is none of the tools" if tools else f"{wanted.removeprefix('=')!r} needs tools"
        raise ApiError(400, f"tool_choice: {what}", param="tool_choice", code="invalid_value")
    return Choice(chosen, must=True, parallel=bool(parallel))


class JsonSchema(Body):
    """A schema for the output."""

    name: str | None = Field(None, description="Accepted and ignored.")
    description: str | None = Field(None, description="Accepted and ignored.")
    json_schema: Any = Field(True, alias="schema", description="See `strict`.")
    strict: bool | None = Field(None, description="True: what of the schema cannot be enforced is a 400.")


class ResponseFormat(Body):
    """The form of the output, enforced while it is generated."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema belongs to type "json_schema", and is required there')
        return self

    @property
    def strict(self) -> bool:
        """Whether all of the schema must be enforced."""
        return bool(self.json_schema and self.json_schema.strict)

    def wanted(self) -> Any | None:
        """The JSON schema to enforce; None: any text."""
        if self.type == "json_object":
            return {"type": "object"}
        return self.json_schema.json_schema if self.json_schema else None
