"""POST /v1/messages: Anthropic's Messages API, and its token count.

https://docs.anthropic.com/en/api/messages
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BeforeValidator, Field

from llamaherd_server.api.answer import answer, json_response, run_of
from llamaherd_server.api.chat_fields import MOST_TOOLS, Name, choice_of
from llamaherd_server.api.conversation import Conversation, prepare
from llamaherd_server.api.fields import Body, SamplingFields, Text
from llamaherd_server.api.messages_shape import MessagesShape
from llamaherd_server.api.routing import ModelRoute
from llamaherd_server.api.state import state_of
from llamaherd_server.chat.tools import Tool
from llamaherd_server.error_responses import MessagesErrorBody
from llamaherd_server.errors import unsupported

router = APIRouter(route_class=ModelRoute)
_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": MessagesErrorBody}, "5XX": {"model": MessagesErrorBody}}


class CacheControl(Body):
    """Accepted and ignored: equal prefixes are always shared."""

    type: Literal["ephemeral"]
    ttl: str | None = None


class TextBlock(Body):
    """Text."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: list[Any] | None = Field(None, max_length=0, description="Only an empty list.")


class ThinkingBlock(Body):
    """What the model thought; given to the chat template."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = Field(None, description="Accepted and ignored.")


class ToolUseBlock(Body):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: str = Field(min_length=1, max_length=256)
    name: Name
    input: dict[str, Any]
    cache_control: CacheControl | None = None


def _blocks(content: Any) -> Any:
    """Text as a block; what is neither text nor of a tool is refused by name."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, list):
        for block in content:
            kind = block.get("type") if isinstance(block, dict) else None
            if kind in ("image", "document", "search_result", "container_upload"):
                raise unsupported("messages", f"messages: a block of type {kind!r} is not supported: send text")
    return content


class ToolResultBlock(Body):
    """What came of a call."""

    type: Literal["tool_result"]
    tool_use_id: str = Field(min_length=1, max_length=256)
    content: Annotated[list[TextBlock], BeforeValidator(_blocks, json_schema_input_type=str | list[TextBlock])] = Field(
        [], description="Text, or blocks of it."
    )
    is_error: bool = Field(False, description="Accepted; the content is what tells the model.")
    cache_control: CacheControl | None = None


Block = Annotated[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]


class Turn(Body):
    """One turn of a conversation; `system` stands where it is, if the model's template can."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Block], BeforeValidator(_blocks, json_schema_input_type=str | list[Block])] = Field(
        min_length=1, description="Text, or blocks of text, thinking, tool use and tool results."
    )

    def for_template(self) -> list[dict[str, Any]]:
        """As transformers' templates expect it: results are turns of their own."""
        results = [
            {"role": "tool", "tool_call_id": block.tool_use_id, "content": _text(block.content)}
            for block in self.content
            if isinstance(block, ToolResultBlock)
        ]
        calls = [
            {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}
            for block in self.content
            if isinstance(block, ToolUseBlock)
        ]
        thoughts = "".join(block.thinking for block in self.content if isinstance(block, ThinkingBlock))
        texts = [block for block in self.content if isinstance(block, TextBlock)]
        message = {
            "role": self.role,
            "content": _text(texts),
            **({"tool_calls": calls} if calls else {}),
            **({"reasoning_content": thoughts} if thoughts else {}),
        }
        return [*results, message] if texts or calls or not results else results


def _text(blocks: list[TextBlock]) -> str:
    return "\n".join(block.text for block in blocks)


class MessagesTool(Body):
    """A tool that the model may use."""

    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: dict[str, Any] = Field(description="A JSON schema.")
    strict: bool = Field(False, description="True: calls always follow the schema.")
    cache_control: CacheControl | None = None


class ToolChoice(Body):
    """Whether tools are used. `any` and `tool` are enforced by grammar."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(None, description="With type `tool`: which one.")
    disable_parallel_tool_use: bool | None = Field(
        None, description="True: at most one call. Default: as many as the model likes; one where it must call."
    )

    def wanted(self) -> str:
        """As `choice_of` takes it."""
        return {"any": "required", "tool": f"={self.name}"}.get(self.type, self.type)


class Thinking(Body):
    """Whether the model should think first; given to the chat template as `enable_thinking`."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1, description="Accepted and ignored: max_tokens is the bound.")
    display: str | None = Field(None, description="Accepted and ignored.")


class OutputFormat(Body):
    """The form of the answer, enforced while it is generated."""

    type: Literal["json_schema"]
    json_schema: Any = Field(alias="schema")


class OutputConfig(Body):
    """How the answer should be."""

    format: OutputFormat | None = None
    effort: str | None = Field(None, description="Given to the chat template as `reasoning_effort`.")


class CountRequest(Body):
    """A conversation."""

    model: str = Field(description="A name of /v1/models.")
    messages: list[Turn] = Field(min_length=1, max_length=4096, description="The conversation so far.")
    system: Annotated[
        list[TextBlock] | None, BeforeValidator(_blocks, json_schema_input_type=str | list[TextBlock] | None)
    ] = Field(None, description="What stands before the conversation.")
    tools: list[MessagesTool] | None = Field(None, max_length=MOST_TOOLS, description="Tools that may be used.")
    tool_choice: ToolChoice | None = Field(None, description="Default: auto.")
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    context_management: dict[str, Any] | None = Field(None, description="Accepted and ignored: nothing is cleared.")

    def conversation(self) -> Conversation:
        """What is to be rendered and how the answer must look; raises ApiError."""
        system = [{"role": "system", "content": _text(self.system)}] if self.system else []
        tools = [Tool(tool.name, tool.description, tool.input_schema, tool.strict) for tool in self.tools or ()]
        choice = self.tool_choice or ToolChoice.model_validate({"type": "auto"})
        config = self.output_config or OutputConfig.model_validate({})
        variables: dict[str, Any] = {} if config.effort is None else {"reasoning_effort": config.effort}
        if self.thinking is not None:
            variables["enable_thinking"] = self.thinking.type != "disabled"
        return Conversation(
            messages=[*system, *(message for turn in self.messages for message in turn.for_template())],
            choice=choice_of(
                tools,
                choice.wanted(),
                parallel=None if choice.disable_parallel_tool_use is None else not choice.disable_parallel_tool_use,
            ),
            answer_schema=config.format.json_schema if config.format else None,
            answer_field="output_config",
            answer_strict=True,
            variables=variables,
        )


class MessagesRequest(CountRequest, SamplingFields):
    """A conversation to continue. Sampling fields that Anthropic does not have are llama-server's."""

    max_tokens: int = Field(ge=1, le=2**31 - 1, description="Most tokens of the answer.")
    stop_sequences: list[Text] = Field([], max_length=16, description="Texts that end the answer.")
    stream: bool = Field(False, description="True: server-sent events.")
    metadata: dict[str, Any] | None = Field(None, description="Accepted and ignored.")
    service_tier: str | None = Field(None, description="Accepted and ignored.")


@router.post("/v1/messages", response_class=Response, responses=_ERRORS)
async def messages(body: MessagesRequest, request: Request) -> Response:
    """Answer a conversation, in Anthropic's shape."""
    state = state_of(request)
    state.check_model(body.model, request.state.key)
    chat = await prepare(state, body.conversation())
    generation = chat.generate(body.sampling(), max_tokens=body.max_tokens, stop=body.stop_sequences)
    shape = MessagesShape(state.model_name, chat.reader)
    return await answer(request, run_of(request, [generation]), shape, stream=body.stream)


@router.post("/v1/messages/count_tokens", response_class=Response, responses=_ERRORS)
async def count_tokens(body: CountRequest, request: Request) -> Response:
    """How many tokens a conversation has in the model's own chat format."""
    state = state_of(request)
    state.check_model(body.model, request.state.key)
    chat = await prepare(state, body.conversation())
    tokens = await state.engine.tokenize(chat.prompt, add_special=chat.add_special)
    return json_response({"input_tokens": len(tokens)})
