"""The parts of a chat request: messages, tools, response format."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from llamaherd_server.api.fields import Body, Lenient
from llamaherd_server.api.media import Collected, MediaPart
from llamaherd_server.errors import ApiError, shown, unsupported
from llamaherd_server.http.json_body import check_cost
from llamaherd_server.toolcalls.surrogates import without_lone_surrogates
from llamaherd_server.toolcalls.tools import Tool

MAX_TOOLS = 128
# Deeper arguments are passed to templates as text, because Python's json and Jinja recurse.
MAX_DEPTH = 64
MAX_ID_CHARS = 2**16  # characters; LiteLLM puts encrypted reasoning into the ids of calls
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]


def by_type(*known: str) -> Discriminator:
    """Discriminate a union by the object's `type`. The tag is the type if it is in `known`, otherwise `other`."""

    def tag(value: Any) -> str:
        kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
        return kind if kind in known else "other"

    return Discriminator(tag)


def only_types(*kinds: str | None) -> BeforeValidator:
    """Drop tools of any other type, such as those that OpenAI or Anthropic run on their own servers."""

    def only(tools: Any) -> Any:
        if not isinstance(tools, list):
            return tools
        return [tool for tool in tools if not isinstance(tool, dict) or tool.get("type") in kinds]

    return BeforeValidator(only)


class TextPart(Lenient):
    """A part of a message's content."""

    type: Literal["text", "input_text", "output_text", "refusal", "thinking", "reasoning"] = "text"
    text: str = ""
    refusal: str = Field("", description="With type `refusal`: its text.")


class OtherPart(Lenient):
    """A part of any other type, which cannot be passed to the model."""

    type: str


# Parts ignored in an assistant's turn: reasoning for its own provider only, and calls that `tool_calls` repeats.
_THOUGHTS = ("redacted_thinking", "reasoning_text", "reasoning_content", "summary_text")
_CALLS = ("tool_use", "tool_call", "function_call")
_TEXT_PARTS = get_args(TextPart.model_fields["type"].annotation)
_MEDIA_PARTS = get_args(MediaPart.model_fields["type"].annotation)


def _part_kind(part: Any) -> str:
    kind = part.get("type") or "text" if isinstance(part, dict) else getattr(part, "type", "text")
    return "text" if kind in _TEXT_PARTS else "media" if kind in _MEDIA_PARTS else "other"


Part = Annotated[
    Annotated[TextPart, Tag("text")] | Annotated[MediaPart, Tag("media")] | Annotated[OtherPart, Tag("other")],
    Discriminator(_part_kind),
]


def arguments_text(arguments: Any) -> str:
    """Return a call's arguments as text. Clients send the text that the model wrote, or the object parsed from it."""
    try:
        return arguments if isinstance(arguments, str) else json.dumps(arguments)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


class CalledFunction(Lenient):
    """The function that was called."""

    name: str = ""
    arguments: Annotated[str, BeforeValidator(arguments_text, json_schema_input_type=str | dict[str, Any])] = Field(
        "", description="The arguments as the model wrote them, usually a JSON object as text."
    )


class CalledCustom(Lenient):
    """A called tool of OpenAI's type `custom`, whose input is text."""

    name: str = ""
    input: str = ""


class ToolCall(Lenient):
    """A call that the model made. Any name and arguments are accepted, because an earlier answer is never refused."""

    id: str = Field("", max_length=MAX_ID_CHARS)
    function: CalledFunction | None = None
    custom: CalledCustom | None = None

    def for_template(self) -> dict[str, Any]:
        if self.custom is not None:
            return template_call(self.id, self.custom.name, json.dumps({"input": self.custom.input}))
        name, arguments = (self.function.name, self.function.arguments) if self.function else ("", "")
        return template_call(self.id, name, arguments)


def _as_parts(content: Any) -> Any:
    """Wrap strings, alone or in a list, as text parts."""
    parts = [content] if isinstance(content, str) else content
    return [{"text": one} if isinstance(one, str) else one for one in parts] if isinstance(parts, list) else parts


class Message(Lenient):
    """One turn of a chat, with those fields of SDKs and other servers that a chat template can use."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"] = Field(
        description="`function` is OpenAI's older name for `tool`."
    )
    content: Annotated[
        list[Part] | None, BeforeValidator(_as_parts, json_schema_input_type=str | list[Part] | None)
    ] = Field(None, description="Text, or parts, which newlines join. Optional only for assistants and tools.")
    name: str | None = Field(None, max_length=256, description="Passed to the chat template.")
    tool_calls: list[ToolCall] = Field([], max_length=MAX_TOOLS, description="Calls made in this turn.")
    function_call: CalledFunction | None = Field(None, description="OpenAI's older form of `tool_calls`.")
    tool_call_id: str | None = Field(None, max_length=MAX_ID_CHARS, description="The call of this result.")
    reasoning_content: str | None = Field(None, description="Passed to the chat template.")
    reasoning: Any = Field(None, description="Another name of `reasoning_content`.")
    refusal: str | None = Field(None, description="Used as the content if that is missing.")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.content is None and self.role not in ("assistant", "tool", "function"):
            raise ValueError(f'content is missing: a message of the role "{self.role}" needs it')
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError('a message of the role "tool" needs tool_call_id')
        calls = _CALLS if self.tool_calls or self.function_call else ()
        repeated = (*_THOUGHTS, *calls) if self.role == "assistant" else ()
        for part in self.content or ():
            if isinstance(part, OtherPart) and part.type not in repeated:
                message = f"messages: content of type {shown(part.type)} is not supported: send text"
                raise unsupported("messages", message)
        return self

    def for_template(self, media: Collected) -> dict[str, Any]:
        """Return the message as transformers' templates expect it. Adds its media to `media`."""
        message: dict[str, Any] = {"role": self.role, "content": self._text(media) or self.refusal or ""}
        if self.name is not None:
            message["name"] = self.name
        if self.role in ("tool", "function"):
            message |= {"role": "tool", "tool_call_id": self.tool_call_id or ""}
        if self.role == "assistant":
            calls = [call.for_template() for call in self.tool_calls]
            if self.function_call and not calls:
                calls = [template_call("", self.function_call.name, self.function_call.arguments)]
            if calls:
                message["tool_calls"] = calls
            thought = self.reasoning_content or self.reasoning
            if thought and isinstance(thought, str):
                message["reasoning_content"] = thought
        return message

    def _text(self, media: Collected) -> str | None:
        """Return the content as one text, joined as llama.cpp does, without reasoning."""
        if self.content is None:
            return None
        texts = []
        for part in self.content:
            if isinstance(part, MediaPart):
                texts.append(media.place(part))
            elif isinstance(part, TextPart) and part.type not in ("thinking", "reasoning"):
                texts.append(part.text or part.refusal)
        return "\n".join(texts)


def template_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """Return a call as transformers' templates expect it, with its arguments as an object."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments_object(arguments)}}


def arguments_object(arguments: str) -> dict[str, Any]:
    """Parse the arguments. Returns {"raw": arguments} if they are no JSON object, or too deep or costly to parse."""
    try:
        check_cost(arguments.encode(errors="replace"))
        value = json.loads(without_lone_surrogates(arguments) or "{}")
    except (ApiError, ValueError, RecursionError):
        value = arguments
    return value if isinstance(value, dict) and not _nested(value, MAX_DEPTH) else {"raw": arguments}


def _nested(value: Any, depth: int) -> bool:
    """Return whether `value` is nested more than `depth` levels deep."""
    level = [value]
    for _ in range(depth):
        level = [inner for one in level if isinstance(one, dict | list) for inner in _members(one)]
    return bool(level)


def _members(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


class Function(Lenient):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema. Default: no parameters.")
    strict: bool | None = Field(None, description="True: calls follow the schema, even with tool_choice auto.")


class ToolField(Lenient):
    """A tool of the request."""

    type: Literal["function"]
    function: Function

    def tool(self) -> Tool:
        function = self.function
        return Tool(function.name, function.description, function.parameters, bool(function.strict))


class JsonSchema(Body):
    """A schema for the output."""

    name: str | None = Field(None, description="Accepted and ignored.")
    description: str | None = Field(None, description="Accepted and ignored.")
    json_schema: Any = Field(True, alias="schema", description="See `strict`.")
    strict: bool | None = Field(None, description="True: a 400 if the schema cannot be fully enforced.")


class ResponseFormat(Body):
    """The format of the output, enforced during generation."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    unwrapped: Any = Field(None, alias="schema", description="The schema in llama-server's place, for both types.")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.type == "text" and self._schema() is not None:
            raise ValueError('a schema belongs to the type "json_schema" or "json_object", not "text"')
        if self.type == "json_schema" and self._schema() is None:
            raise ValueError('json_schema is missing: the type "json_schema" needs it')
        return self

    @property
    def strict(self) -> bool:
        """Whether the whole schema must be enforced."""
        return bool(self.json_schema and self.json_schema.strict)

    def wanted(self) -> Any | None:
        """Return the JSON schema to enforce; None: any text."""
        if self.type == "text":
            return None
        schema = self._schema()
        return {"type": "object"} if schema in (None, {}) else schema

    def _schema(self) -> Any | None:
        return self.json_schema.json_schema if self.json_schema else self.unwrapped
