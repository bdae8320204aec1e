"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any, Literal, Self

from fastapi import APIRouter, Request, Response
from pydantic import Field, model_validator

from llamaherd_server.api.answer import answer, json_response, run_of
from llamaherd_server.api.chat_fields import MAX_TOOLS, Message, ResponseFormat, ToolField
from llamaherd_server.api.conversation import Conversation, prepare, token_count_response
from llamaherd_server.api.fields import GenerationFields, Ignored, Limit
from llamaherd_server.api.llama_fields import renamed
from llamaherd_server.api.media import Collected
from llamaherd_server.api.openai.chat_shape import ChatShape
from llamaherd_server.api.routing import ModelRoute
from llamaherd_server.api.sampling import most_tokens, resolve_sampling
from llamaherd_server.api.state import state_of
from llamaherd_server.api.tool_choice import ToolChoice, choice_of
from llamaherd_server.api.wire import Options
from llamaherd_server.errors import unsupported
from llamaherd_server.http.json_body import run_off_loop

router = APIRouter(route_class=ModelRoute)


class ChatRequest(GenerationFields):
    """A chat to continue."""

    messages: list[Message] = Field(min_length=1, max_length=4096, description="The chat so far.")
    max_completion_tokens: Limit = Field(None, description="OpenAI's newer name of `max_tokens`.")
    response_format: ResponseFormat | None = Field(None, description="Not together with `grammar`.")
    json_schema: Any = Field(None, description="llama-server's short form of a `response_format` of that type.")
    logprobs: bool = Field(False, description="True: the log probability of each token of the answer.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="So many alternatives for each; needs `logprobs`.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables for the chat template.")
    reasoning_effort: str | None = Field(
        None, description="How much the model should reason: the chat template's business, or a bound of tokens."
    )
    reasoning_budget_tokens: int | None = Field(None, ge=-1, description="Most tokens of reasoning; -1: no bound.")
    tools: list[ToolField] | None = Field(None, max_length=MAX_TOOLS, description="Functions that may be called.")
    tool_choice: ToolChoice = None
    functions: list[Any] = Field([], description="Only empty: an older word of OpenAI's for `tools`.")
    function_call: Any = Field(None, description="Only none or auto: an older word of OpenAI's for `tool_choice`.")
    parallel_tool_calls: bool | None = Field(
        None, description="False: at most one call. Default: as many as the model likes; one where it must call."
    )
    reasoning_format: Literal["auto", "none", "deepseek"] | None = Field(
        None, description="`none`: reasoning stays in `content`. Default: it goes to `reasoning_content`."
    )
    add_generation_prompt: bool | None = Field(
        None, description="False: the assistant's last turn is continued. Not true with `continue_final_message`."
    )
    continue_final_message: bool = Field(False, description="True: the assistant's last turn is continued.")
    modalities: list[Literal["text"]] | None = Field(None, description="Only text.")
    prediction: Ignored = None
    verbosity: Ignored = None

    @model_validator(mode="before")
    @classmethod
    def _llama_servers(cls, body: Any) -> Any:
        """llama-server's fields under their names here, such as its number of log probabilities."""
        body = renamed(body, {"thinking_budget_tokens": "reasoning_budget_tokens"})
        if isinstance(body, dict):
            count = body.get("n_probs", body.get("logprobs"))
            if type(count) is int:
                named = renamed(body, {"n_probs": "top_logprobs"})
                return {"top_logprobs": count, **named, "logprobs": True} if count else {**named, "logprobs": False}
        return body

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise unsupported("top_logprobs", "top_logprobs: needs logprobs: true")
        if self.grammar and self._answer_schema() is not None:
            raise unsupported("grammar", "grammar: not together with response_format or json_schema")
        if self.functions or self.function_call not in (None, "none", "auto"):
            raise unsupported("functions", "functions: an older word of OpenAI's: send tools, and tool_choice")
        last = self.messages[-1]
        continues = last.role == "assistant" and not last.tool_calls
        if self.continue_final_message and (self.add_generation_prompt or not continues):
            message = (
                "continue_final_message: needs an assistant's last turn without calls, and no add_generation_prompt"
            )
            raise unsupported("continue_final_message", message)
        if self.add_generation_prompt is False and not continues:
            message = "add_generation_prompt: false only where the assistant's last turn is to be continued"
            raise unsupported("add_generation_prompt", message)
        return self

    def _answer_schema(self) -> Any | None:
        wanted = self.response_format.wanted() if self.response_format else None
        return self.json_schema if wanted is None else wanted

    def conversation(self) -> Conversation:
        """What is to be rendered and how the answer must look; raises ApiError."""
        media = Collected()
        tools = [tool.tool() for tool in self.tools or ()]
        return Conversation(
            messages=[message.for_template(media) for message in self.messages],
            media=media,
            choice=choice_of(tools, self.tool_choice, parallel=self.parallel_tool_calls),
            answer_schema=self._answer_schema(),
            answer_strict=bool(self.response_format and self.response_format.strict),
            variables=self.chat_template_kwargs or {},
            effort=self.reasoning_effort,
            reasoning_tokens=self.reasoning_budget_tokens,
            split_reasoning=self.reasoning_format != "none",
        )


@router.post("/v1/chat/completions", response_class=Response)
@router.post("/chat/completions", response_class=Response, include_in_schema=False)
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answer a chat, in the model's own chat format."""
    state = state_of(request)
    state.check_model(body.model, request.state.key)
    await resolve_sampling(state, body)
    chat = await prepare(state, await run_off_loop(request, body.conversation))
    requests = [
        chat.generate(
            body.sampling(index),
            max_tokens=most_tokens(state, body.max_completion_tokens or body.max_tokens),
            stop=body.stop or [],
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            cache_prompt=body.cache_prompt,
        )
        for index in range(body.n)
    ]
    shape = ChatShape(Options.of(body, state, requests), chat.reader, logprobs=body.logprobs)
    return await answer(request, run_of(request, requests, body.n), shape, stream=body.stream)


@router.post("/apply-template", response_class=Response)
async def apply_template(body: ChatRequest, request: Request) -> Response:
    """The prompt that a chat becomes, without computing anything, as llama-server has it."""
    chat = await prepare(state_of(request), await run_off_loop(request, body.conversation))
    return json_response({"prompt": chat.prompt})


@router.post("/v1/chat/completions/input_tokens", response_class=Response)
@router.post("/chat/completions/input_tokens", response_class=Response, include_in_schema=False)
async def input_tokens(body: ChatRequest, request: Request) -> Response:
    """How many tokens a chat has in the model's own chat format, as llama-server counts them."""
    state = state_of(request)
    return await token_count_response(state, await prepare(state, await run_off_loop(request, body.conversation)))
