"""POST /v1/messages: Anthropic's Messages API, and its token count.

https://docs.anthropic.com/en/api/messages
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Request, Response
from pydantic import BeforeValidator, Field, Tag, model_validator

from llamaherd_server.api.answer import answer, json_response, run_of
from llamaherd_server.api.anthropic.documents import DocumentBlock, SearchResultBlock
from llamaherd_server.api.anthropic.messages_shape import MessagesShape
from llamaherd_server.api.chat_fields import (
    MAX_ID_CHARS,
    MAX_TOOLS,
    Name,
    arguments_text,
    by_type,
    only_types,
    template_call,
)
from llamaherd_server.api.conversation import Conversation, prepare
from llamaherd_server.api.fields import AccountFields, Ignored, Lenient, Limit, SamplingFields, Text
from llamaherd_server.api.media import Collected, MediaPart
from llamaherd_server.api.routing import ModelRoute
from llamaherd_server.api.sampling import most_tokens, resolve_sampling
from llamaherd_server.api.state import state_of
from llamaherd_server.api.tool_choice import NamedChoice, Wanted, choice_of
from llamaherd_server.errors import unsupported
from llamaherd_server.http.error_responses import MessagesErrorBody
from llamaherd_server.http.json_body import run_off_loop
from llamaherd_server.toolcalls.tools import Tool

router = APIRouter(route_class=ModelRoute)
_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": MessagesErrorBody}, "5XX": {"model": MessagesErrorBody}}


class TextBlock(Lenient):
    """Text."""

    type: Literal["text"]
    text: str


class ImageBlock(Lenient):
    """An image, for a model with a projector."""

    type: Literal["image"]
    source: Any = Field(None, description="An object with base64 as `data`, or a data URL as `url`.")

    @model_validator(mode="after")
    def _sound(self) -> Self:
        self.part()
        return self

    def part(self) -> MediaPart:
        """As a chat has it; raises what a validator may."""
        return MediaPart.model_validate({"type": "image_url", "image_url": self.source})


class ThinkingBlock(Lenient):
    """What the model thought; given to the chat template."""

    type: Literal["thinking"]
    thinking: str = ""


class ToolUseBlock(Lenient):
    """A call that the model made, with any name and input: an earlier answer is never refused."""

    type: Literal["tool_use"]
    id: str = Field("", max_length=MAX_ID_CHARS)
    name: str = ""
    input: Annotated[str, BeforeValidator(arguments_text, json_schema_input_type=dict[str, Any])] = "{}"


class OtherBlock(Lenient):
    """Any other type: ignored in the assistant's turns (thinking that is encrypted, tools of Anthropic's servers)."""

    type: str


def _as_blocks(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _refuse_others(blocks: list[Any], allowed: Collection[str] = ()) -> None:
    """Raise for a block that cannot be shown to the model."""
    for block in blocks:
        if isinstance(block, OtherBlock) and block.type not in allowed:
            raise unsupported("messages", f"messages: a block of type {block.type!r} is not supported: send text")


def _texts(blocks: list[Any], media: Collected) -> str:
    """The blocks as one text, with images at their places."""
    kinds = TextBlock | ImageBlock | DocumentBlock | SearchResultBlock
    shown = [block for block in blocks if isinstance(block, kinds)]
    return "\n".join(media.place(block.part()) if isinstance(block, ImageBlock) else block.text for block in shown)


_SHOWN = ("text", "image", "document", "search_result")
ResultBlock = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ImageBlock, Tag("image")]
    | Annotated[DocumentBlock, Tag("document")]
    | Annotated[SearchResultBlock, Tag("search_result")]
    | Annotated[OtherBlock, Tag("other")],
    by_type(*_SHOWN),
]


class ToolResultBlock(Lenient):
    """What came of a call; whether that was an error is for its content to say."""

    type: Literal["tool_result"]
    tool_use_id: str = Field("", max_length=MAX_ID_CHARS)
    content: Annotated[
        list[ResultBlock],
        BeforeValidator(_as_blocks, json_schema_input_type=str | list[TextBlock]),
    ] = Field([], description="Text, or blocks of text and images.")

    @model_validator(mode="after")
    def _supported(self) -> Self:
        _refuse_others(self.content, ["tool_reference"])
        return self


Block = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ImageBlock, Tag("image")]
    | Annotated[DocumentBlock, Tag("document")]
    | Annotated[SearchResultBlock, Tag("search_result")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")]
    | Annotated[OtherBlock, Tag("other")],
    by_type(*_SHOWN, "thinking", "tool_use", "tool_result"),
]


class Turn(Lenient):
    """One turn of a conversation; `system` stands where it is, if the model's template can."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Block], BeforeValidator(_as_blocks, json_schema_input_type=str | list[Block])] = Field(
        [], description="Text, or blocks of text, images, thinking, tool use and tool results."
    )

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.role != "assistant":
            _refuse_others(self.content)
            if not self.content:
                raise ValueError(f"content is missing: a turn of the role {self.role!r} needs it")
        return self

    def for_template(self, media: Collected) -> list[dict[str, Any]]:
        """As transformers' templates expect it: results are turns of their own. Its images are taken by `media`."""
        results = [
            {"role": "tool", "tool_call_id": block.tool_use_id, "content": _texts(block.content, media)}
            for block in self.content
            if isinstance(block, ToolResultBlock)
        ]
        calls = [
            template_call(block.id, block.name, block.input)
            for block in self.content
            if isinstance(block, ToolUseBlock)
        ]
        thoughts = "".join(block.thinking for block in self.content if isinstance(block, ThinkingBlock))
        text = _texts(self.content, media)
        message = {
            "role": self.role,
            "content": text,
            **({"tool_calls": calls} if calls else {}),
            **({"reasoning_content": thoughts} if thoughts else {}),
        }
        return [*results, message] if text or calls or not results else results


class MessagesTool(Lenient):
    """A tool that the model may use. One of another type is of Anthropic's servers, and left out."""

    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: dict[str, Any] = Field(description="A JSON schema.")
    strict: bool = Field(False, description="True: calls always follow the schema.")


class ToolChoice(Lenient):
    """Whether tools are used. `any` and `tool` are enforced by grammar."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(None, description="With type `tool`: which one.")
    disable_parallel_tool_use: bool | None = Field(
        None, description="True: at most one call. Default: as many as the model likes; one where it must call."
    )

    def wanted(self) -> Wanted:
        """As `choice_of` takes it."""
        if self.type == "tool":
            return NamedChoice(type="function", name=self.name or "")
        return "required" if self.type == "any" else self.type


class Thinking(Lenient):
    """Whether the model should think first; given to the chat template as `enable_thinking`."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1, description="Most tokens of reasoning, with type `enabled`.")
    display: str | None = Field(None, description="Accepted and ignored.")


class OutputFormat(Lenient):
    """The form of the answer, enforced while it is generated."""

    type: Literal["json_schema"]
    json_schema: Any = Field(alias="schema")


class OutputConfig(Lenient):
    """How the answer should be."""

    format: OutputFormat | None = None
    effort: str | None = Field(None, description="As chat's `reasoning_effort`.")


class CountRequest(AccountFields):
    """A conversation."""

    model: str | None = Field(None, description="A name of /v1/models; left out: the model that is served.")
    messages: list[Turn] = Field(min_length=1, max_length=4096, description="The conversation so far.")
    system: Annotated[list[TextBlock], BeforeValidator(_as_blocks, json_schema_input_type=str | list[TextBlock])] = (
        Field([], description="What stands before the conversation.")
    )
    tools: Annotated[list[MessagesTool], only_types(None, "custom")] = Field(
        [], max_length=MAX_TOOLS, description="Tools that may be used; those of Anthropic's servers are left out."
    )
    tool_choice: ToolChoice | None = Field(None, description="Default: auto.")
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    context_management: Any = Field(None, description="Accepted and ignored: nothing is cleared.")
    cache_control: Any = Field(None, description="Accepted and ignored: a key's equal prefixes are always shared.")
    betas: Ignored = None
    speed: Ignored = None
    inference_geo: Ignored = None
    diagnostics: Ignored = None
    container: Any = Field(None, description="Accepted and ignored: Anthropic's servers have them.")
    mcp_servers: Any = Field(None, description="Accepted and ignored: Anthropic's servers call them.")
    user_profile_id: Ignored = None
    workspace_id: Ignored = None

    @model_validator(mode="before")
    @classmethod
    def _as_now(cls, body: Any) -> Any:
        """`output_format` is what the beta called `output_config.format`."""
        if not isinstance(body, dict) or not body.get("output_format"):
            return body
        config = body.get("output_config") or {}
        given = {name: value for name, value in body.items() if name != "output_format"}
        return given | {"output_config": {"format": body["output_format"], **config}}

    def conversation(self) -> Conversation:
        """What is to be rendered and how the answer must look; raises ApiError."""
        media = Collected()
        system = [{"role": "system", "content": _texts(self.system, media)}] if self.system else []
        tools = [Tool(tool.name, tool.description, tool.input_schema, tool.strict) for tool in self.tools]
        choice = self.tool_choice or ToolChoice.model_validate({"type": "auto"})
        config = self.output_config or OutputConfig.model_validate({})
        variables, tokens = dict[str, Any](), None
        if self.thinking is not None:
            variables["enable_thinking"] = self.thinking.type != "disabled"
            tokens = 0 if self.thinking.type == "disabled" else self.thinking.budget_tokens
        return Conversation(
            messages=[*system, *(message for turn in self.messages for message in turn.for_template(media))],
            media=media,
            choice=choice_of(
                tools,
                choice.wanted(),
                parallel=None if choice.disable_parallel_tool_use is None else not choice.disable_parallel_tool_use,
            ),
            answer_schema=config.format.json_schema if config.format else None,
            answer_field="output_config",
            answer_strict=True,
            variables=variables,
            effort=config.effort,
            reasoning_tokens=tokens,
        )


class MessagesRequest(CountRequest, SamplingFields):
    """A conversation to continue. Sampling fields that Anthropic does not have are llama-server's."""

    max_tokens: Limit = Field(None, description="Most tokens of the answer; left out: as the model's settings say.")
    stop_sequences: list[Text] = Field([], max_length=16, description="Texts that end the answer.")
    stream: bool = Field(False, description="True: server-sent events.")


@router.post("/v1/messages", response_class=Response, responses=_ERRORS)
async def messages(body: MessagesRequest, request: Request) -> Response:
    """Answer a conversation, in Anthropic's shape."""
    state = state_of(request)
    state.check_model(body.model, request.state.key)
    chat = await prepare(state, await run_off_loop(request, body.conversation))
    await resolve_sampling(state, body)
    generation = chat.generate(
        body.sampling(), max_tokens=most_tokens(state, body.max_tokens), stop=body.stop_sequences
    )
    shape = MessagesShape(state.model_name, chat.reader)
    return await answer(request, run_of(request, [generation]), shape, stream=body.stream)


@router.post("/v1/messages/count_tokens", response_class=Response, responses=_ERRORS)
async def count_tokens(body: CountRequest, request: Request) -> Response:
    """How many tokens a conversation has in the model's own chat format."""
    state = state_of(request)
    state.check_model(body.model, request.state.key)
    chat = await prepare(state, await run_off_loop(request, body.conversation))
    return json_response({"input_tokens": await state.engine.count_tokens(chat.prompt, add_special=chat.add_special)})
