"""POST /v1/responses: OpenAI's Responses API, without memory of earlier responses.

https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Request, Response
from pydantic import BeforeValidator, Field, Tag, model_validator

from llamaherd_server.api.answer import answer, run_of
from llamaherd_server.api.chat_fields import (
    MAX_ID_CHARS,
    MAX_TOOLS,
    Name,
    arguments_text,
    by_type,
    only_types,
    template_call,
)
from llamaherd_server.api.conversation import Conversation, prepare, token_count_response
from llamaherd_server.api.fields import Ignored, Lenient, Limit, OpenAiFields, SamplingFields, StreamOptions
from llamaherd_server.api.media import Collected, MediaPart
from llamaherd_server.api.openai.responses_shape import ResponsesShape
from llamaherd_server.api.routing import ModelRoute
from llamaherd_server.api.sampling import most_tokens, resolve_sampling
from llamaherd_server.api.state import state_of
from llamaherd_server.api.tool_choice import ToolChoice, choice_of
from llamaherd_server.errors import ApiError, unsupported
from llamaherd_server.http.json_body import run_off_loop
from llamaherd_server.toolcalls.tools import Tool

router = APIRouter(route_class=ModelRoute)


class Part(Lenient):
    """A part of a text."""

    type: Literal["input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text"] = "text"
    text: str = ""
    refusal: str = Field("", description="With type `refusal`: its text.")


class ImagePart(Lenient):
    """An image, for a model with a projector."""

    type: Literal["input_image"]
    image_url: Any = Field(None, description="`data:image/…;base64,…`")


def _parted(content: Any) -> Any:
    """Texts, and media as a chat has them."""
    if not isinstance(content, list):
        return [content]
    for part in content:
        if isinstance(part, dict) and str(part.get("type")).startswith("input_file"):
            raise unsupported("input", f"input: a part of type {part['type']!r} is not supported: send text")
    return [_part(part) for part in content]


def _part(given: Any) -> Any:
    kind = given.get("type") if isinstance(given, dict) else None
    if kind in ("input_image", "input_audio"):
        return MediaPart.model_validate({**given, "type": "image_url" if kind == "input_image" else kind})
    part = Part.model_validate(given)
    return part.text or part.refusal


def _text(content: list[str | MediaPart], media: Collected) -> str:
    return "\n".join(part if isinstance(part, str) else media.place(part) for part in content)


Content = Annotated[
    list[str | MediaPart], BeforeValidator(_parted, json_schema_input_type=str | list[Part | ImagePart | MediaPart])
]


class MessageItem(Lenient):
    """A turn."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content = Field([])

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.role != "assistant" and "content" not in self.model_fields_set:
            raise ValueError(f"content is missing: a turn of the role {self.role!r} needs it")
        return self


class CallItem(Lenient):
    """A call that the model made, with any name and arguments: an earlier answer is never refused."""

    type: Literal["function_call"]
    call_id: str = Field(max_length=MAX_ID_CHARS)
    name: str = ""
    arguments: Annotated[str, BeforeValidator(arguments_text)] = Field("{}", description="A JSON object, as text.")


class CustomCallItem(Lenient):
    """A call of a tool that takes text."""

    type: Literal["custom_tool_call"]
    call_id: str = Field(max_length=MAX_ID_CHARS)
    name: str = ""
    input: str = ""


class OutputItem(Lenient):
    """What came of a call."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: str = Field(max_length=MAX_ID_CHARS)
    output: Content = Field([])


class ReasoningItem(Lenient):
    """What the model thought; given to the chat template."""

    type: Literal["reasoning"]
    summary: list[Part] = Field([])
    content: list[Part] = Field([])


class OtherItem(Lenient):
    """Any other type: ignored. Tools of OpenAI's servers, and references to items that nobody stored here."""

    type: str


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CustomCallItem, Tag("custom_tool_call")]
    | Annotated[OutputItem, Tag("function_call_output")]
    | Annotated[OutputItem, Tag("custom_tool_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[OtherItem, Tag("other")],
    by_type(
        *("message", "function_call", "custom_tool_call", "function_call_output", "custom_tool_call_output"),
        "reasoning",
    ),
]


def _items(given: Any) -> Any:
    """Text as a turn of the user; a turn may leave its type out, and so may a reference, which has an id alone."""
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}]
    if isinstance(given, list):
        return [{**item, "type": item.get("type") or _kind(item)} if isinstance(item, dict) else item for item in given]
    return given


def _kind(item: dict[str, Any]) -> str:
    return "item_reference" if [name for name, value in item.items() if value is not None] == ["id"] else "message"


class FunctionTool(Lenient):
    """A function that the model may call."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema; left out: no parameters.")
    strict: bool | None = Field(None, description="True: calls always follow the schema, also with tool_choice auto.")


class TextFormat(Lenient):
    """The form of the answer, enforced while it is generated."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Any = Field(None, alias="schema", description="With type json_schema.")
    strict: bool | None = Field(None, description="True: what of the schema cannot be enforced is a 400.")

    def wanted(self) -> Any | None:
        """The JSON schema to enforce; None: any text."""
        return {"json_object": {"type": "object"}, "json_schema": self.json_schema}.get(self.type)


class TextSettings(Lenient):
    """How the answer is written."""

    format: TextFormat | None = None


class ReasoningSettings(Lenient):
    """How much to think."""

    effort: str | None = Field(None, description="As chat's `reasoning_effort`.")


class ResponsesRequest(SamplingFields, OpenAiFields):
    """A conversation to continue. Fields that OpenAI does not have are llama-server's."""

    model: str | None = Field(None, description="A name of /v1/models; left out: the model that is served.")
    input: Annotated[list[Item], BeforeValidator(_items, json_schema_input_type=str | list[Item])] = Field(
        min_length=1, max_length=4096, description="Text, or the conversation's items."
    )
    instructions: str | None = Field(None, description="The system message.")
    max_output_tokens: Limit = Field(None, description="Most tokens of the answer.")
    stream: bool = Field(False, description="True: server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="Accepted and ignored.")
    tools: Annotated[list[FunctionTool], only_types("function")] = Field(
        [], max_length=MAX_TOOLS, description="Functions that may be called; tools of other types are left out."
    )
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = Field(
        None, description="False: at most one call. Default: as many as the model likes; one where it must call."
    )
    text: TextSettings | None = None
    reasoning: ReasoningSettings | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables for the chat template.")
    store: Any = Field(None, description="Accepted; nothing is stored, and the answer says so.")
    previous_response_id: None = Field(None, description="Only null, as nothing is stored: send the items again.")
    conversation: None = Field(None, description="Only null, as nothing is stored.")
    background: Literal[False] | None = Field(None, description="Only false.")
    truncation: Literal["auto", "disabled"] | None = Field(None, description="What is too long is a 400, with either.")
    include: Any = Field(None, description="Accepted and ignored.")
    metadata: dict[str, Any] | None = Field(None, description="Given back.")
    client_metadata: Ignored = None
    top_logprobs: Literal[0] | None = Field(None, description="Only 0: the answer has no log probabilities.")
    context_management: Any = Field(None, description="Accepted and ignored: nothing is compacted.")
    max_tool_calls: Any = Field(None, description="Accepted and ignored: it counts calls of OpenAI's own tools.")

    def to_prepare(self) -> Conversation:
        """What is to be rendered and how the answer must look; raises ApiError."""
        tools = [Tool(tool.name, tool.description, tool.parameters, bool(tool.strict)) for tool in self.tools]
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        media = Collected()
        if not (messages := [*system, *_turns(self.input, media)]):
            message = "input: there is nothing to answer in it; give a text, or an item of type message"
            raise ApiError(400, message, param="input", code="invalid_value")
        return Conversation(
            messages=messages,
            media=media,
            choice=choice_of(tools, self.tool_choice, parallel=self.parallel_tool_calls),
            answer_schema=self.text.format.wanted() if self.text and self.text.format else None,
            answer_field="text",
            answer_strict=bool(self.text and self.text.format and self.text.format.strict),
            variables=self.chat_template_kwargs or {},
            effort=self.reasoning.effort if self.reasoning else None,
        )

    def told_back(self) -> dict[str, Any]:
        """The fields that a response repeats."""
        given = self.model_dump(by_alias=True, include=set(_TOLD_BACK), exclude_none=True)
        defaults = {"metadata": {}, "parallel_tool_calls": True, "text": {"format": {"type": "text"}}}
        nothing = dict.fromkeys(_TOLD_BACK)
        return {**nothing, "tool_choice": "auto", "tools": [], **defaults, **given}


_TOLD_BACK = (
    *("instructions", "max_output_tokens", "metadata", "parallel_tool_calls", "reasoning", "temperature"),
    *("text", "tool_choice", "tools", "top_p"),
)


def _turns(items: list[Item], media: Collected) -> list[dict[str, Any]]:
    """The items as templates expect them: what the model said, thought and called in one turn is one message.

    Their images are taken by `media`.
    """
    turns: list[dict[str, Any]] = []

    def assistant() -> dict[str, Any]:
        if not turns or turns[-1]["role"] != "assistant":
            turns.append({"role": "assistant", "content": ""})
        return turns[-1]

    def calls() -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = assistant().setdefault("tool_calls", [])
        return made

    for item in items:
        if isinstance(item, CallItem):
            calls().append(template_call(item.call_id, item.name, item.arguments))
        elif isinstance(item, CustomCallItem):
            calls().append(template_call(item.call_id, item.name, json.dumps({"input": item.input})))
        elif isinstance(item, OutputItem):
            turns.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output, media)})
        elif isinstance(item, ReasoningItem):
            text = "".join(part.text for part in item.content or item.summary)
            turns.append({"role": "assistant", "content": "", **({"reasoning_content": text} if text else {})})
        elif isinstance(item, OtherItem):
            continue
        elif item.role == "assistant":
            turn = assistant()
            turn["content"] = "\n".join(filter(None, (turn["content"], _text(item.content, media))))
        else:
            turns.append({"role": item.role, "content": _text(item.content, media)})
    return turns


@router.post("/v1/responses/input_tokens", response_class=Response)
async def response_input_tokens(body: ResponsesRequest, request: Request) -> Response:
    """How many tokens a conversation has in the model's own chat format."""
    state = state_of(request)
    chat = await prepare(state, await run_off_loop(request, body.to_prepare))
    return await token_count_response(state, chat)


@router.post("/v1/responses", response_class=Response)
async def responses(body: ResponsesRequest, request: Request) -> Response:
    """Answer a conversation, in the shape of OpenAI's responses."""
    state = state_of(request)
    state.check_model(body.model, request.state.key)
    await resolve_sampling(state, body)
    chat = await prepare(state, await run_off_loop(request, body.to_prepare))
    generation = chat.generate(body.sampling(), max_tokens=most_tokens(state, body.max_output_tokens))
    shape = ResponsesShape(state.model_name, chat.reader, body.told_back())
    return await answer(request, run_of(request, [generation]), shape, stream=body.stream)
