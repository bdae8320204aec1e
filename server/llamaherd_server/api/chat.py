"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Request, Response
from pydantic import BeforeValidator, Field, model_validator

from llamaherd_server.api.answer import answer
from llamaherd_server.api.chat_shape import ChatShape
from llamaherd_server.api.fields import Body, GenerationFields
from llamaherd_server.api.state import state_of
from llamaherd_server.api.wire import Options
from llamaherd_server.chat import template
from llamaherd_server.chat.schema import schema_grammar
from llamaherd_server.errors import unsupported
from llamaherd_server.generation import Run
from llamaherd_server.protocol import Generate

router = APIRouter()


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


def _joined(content: Any) -> Any:
    """Content parts as one text, joined by line ends as llama.cpp does."""
    if not isinstance(content, list):
        return content
    for part in content:
        if isinstance(part, dict) and part.get("type", "text") != "text":
            raise unsupported("messages", f"messages: content of type {part['type']!r} is not supported: send text")
    return "\n".join(TextPart.model_validate(part).text for part in content)


class Message(Body):
    """One turn of a chat."""

    role: str = Field(min_length=1, max_length=64, description="As the model's chat template knows it.")
    content: Annotated[str, BeforeValidator(_joined, json_schema_input_type=str | list[TextPart])] = Field(
        description="Text, or parts of type `text`, which are joined by line ends."
    )
    name: str | None = Field(None, max_length=256, description="Given to the chat template.")


class JsonSchema(Body):
    """A schema for the output."""

    name: str | None = Field(None, description="Accepted and ignored.")
    description: str | None = Field(None, description="Accepted and ignored.")
    json_schema: Any = Field(True, alias="schema", description="A keyword that cannot be enforced is a 400.")
    strict: bool | None = Field(None, description="Accepted; output always follows the schema.")


class ResponseFormat(Body):
    """The form of the output, enforced while it is generated."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema belongs to type "json_schema", and is required there')
        return self

    def wanted(self) -> Any | None:
        """The JSON schema to enforce; None: any text."""
        if self.type == "json_object":
            return {"type": "object"}
        return self.json_schema.json_schema if self.json_schema else None


class ChatRequest(GenerationFields):
    """A chat to continue."""

    messages: list[Message] = Field(min_length=1, max_length=4096, description="The chat so far.")
    max_completion_tokens: int | None = Field(None, ge=1, description="OpenAI's newer name of `max_tokens`.")
    response_format: ResponseFormat | None = Field(None, description="Not together with `grammar`.")
    logprobs: bool = Field(False, description="True: the log probability of each token of the answer.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="So many alternatives for each; needs `logprobs`.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables for the chat template.")
    reasoning_effort: str | None = Field(None, description="Given to the chat template as a variable.")
    tools: list[Any] | None = Field(None, description="Not supported; an empty list is.")
    tool_choice: Any | None = Field(None, description='Only "none" and "auto", as there are no tools.')
    parallel_tool_calls: bool | None = Field(None, description="Accepted and ignored: there are no tools.")

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.tools:
            raise unsupported("tools", "tools: tool calls are not supported: leave tools out")
        if self.tool_choice not in (None, "none", "auto"):
            raise unsupported("tool_choice", f"tool_choice: {self.tool_choice!r} needs tools, which are not supported")
        if self.top_logprobs is not None and not self.logprobs:
            raise unsupported("top_logprobs", "top_logprobs: needs logprobs: true")
        if self.response_format and self.response_format.wanted() is not None and self.grammar:
            raise unsupported("grammar", "grammar: not together with response_format")
        return self


@router.post("/v1/chat/completions", response_class=Response)
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answer a chat, in the model's own chat format."""
    state = state_of(request)
    state.check_model(body.model, request.state.key)
    model = state.model_info()
    if body.response_format and (schema := body.response_format.wanted()) is not None:
        body.grammar = schema_grammar(schema, "response_format")
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables["reasoning_effort"] = body.reasoning_effort
    messages = [message.model_dump(exclude_none=True) for message in body.messages]
    prompt = await template.render(state.sandbox, model, messages, variables)
    requests = [
        Generate(
            id=0,
            prompt=prompt,
            add_special=template.adds_special(model, prompt),
            max_tokens=body.max_completion_tokens or body.limit(),
            stop=body.stop or [],
            sampling=body.sampling(index),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            cache_prompt=body.cache_prompt,
        )
        for index in range(body.n)
    ]
    shape = ChatShape(Options.of(body, state.model_name), logprobs=body.logprobs)
    run = Run(state.serving, request.state.key, requests, n=body.n, arrived=request.state.log.arrived)
    return await answer(request, run, shape, stream=body.stream)
