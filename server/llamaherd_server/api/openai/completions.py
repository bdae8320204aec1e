"""POST /v1/completions."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any, Self

from fastapi import APIRouter, Request, Response
from pydantic import BeforeValidator, Field, model_validator

from llamaherd_server.api.answer import answer, run_of
from llamaherd_server.api.fields import GenerationFields
from llamaherd_server.api.llama_fields import renamed
from llamaherd_server.api.openai.completion_shape import CompletionShape
from llamaherd_server.api.routing import ModelRoute
from llamaherd_server.api.sampling import most_tokens, resolve_sampling
from llamaherd_server.api.state import AppState, state_of
from llamaherd_server.api.wire import Options
from llamaherd_server.errors import ApiError, unsupported
from llamaherd_server.toolcalls.reader import Reader
from llamaherd_server.toolcalls.tools import AnswerSchema, Choice, reply_grammar
from llamaherd_server.wire.errors import EngineError, too_long
from llamaherd_server.wire.protocol import Generate, ModelInfo

router = APIRouter(route_class=ModelRoute)

_MAX_PROMPTS = 128
_PLAIN = Reader(form=None, thinking=None, thinks=False, schemas={}, parallel=False)


def as_prompts(prompt: Any) -> Any:
    """A prompt, or a list of them, as a list: each is text, tokens, or both in a row. A list with a token is one."""
    several = isinstance(prompt, list) and not any(_is_token(part) for part in prompt)
    return [_as_prompt(one) for one in (prompt if several else [prompt])]


def _as_prompt(prompt: Any) -> Any:
    if isinstance(prompt, dict) and "multimodal_data" not in prompt:
        prompt = prompt.get("prompt_string")  # llama-server's object
    parts = isinstance(prompt, list) and any(map(_is_token, prompt))
    if not (isinstance(prompt, str) or (parts and all(isinstance(part, str) or _is_token(part) for part in prompt))):
        raise ValueError("must be a text, a list of token ids and texts, or a list of such prompts")
    return prompt


async def resolve_prompts(state: AppState, prompts: list[Any]) -> list[str | list[int]]:
    """The prompts, with texts among tokens turned into tokens too."""
    return [await _tokens(state, one) if isinstance(one, list) else one for one in prompts]


async def _tokens(state: AppState, parts: list[str | int]) -> list[int]:
    """Raises EngineError for more than a slot holds, before anything is copied."""
    room = state.engine.status().settings.ctx_per_slot
    given = sum(map(_is_token, parts))
    tokens: list[int] = []
    for place, part in enumerate(parts if given < room else ()):
        tokens += [part] if isinstance(part, int) else await state.engine.tokenize(part, add_special=place == 0)
        if len(tokens) >= room:
            break
    if (count := max(given, len(tokens))) >= room:
        refusal = too_long(count, room, "at least " if len(parts) > given else "")
        raise EngineError(refusal.code, refusal.message, refusal.param, refusal.details)
    return tokens


async def texts_of(state: AppState, prompts: list[str | list[int]], n: int) -> list[str]:
    """The prompts as text, each `n` times; of tokens that are none, nothing: computing them is what fails."""
    texts: list[str] = []
    for prompt in prompts:
        text = prompt if isinstance(prompt, str) else ""
        if not isinstance(prompt, str):
            with suppress(EngineError):
                text = await state.engine.detokenize(prompt)
        texts += [text] * n
    return texts


async def grammar_of(state: AppState, grammar: Any, schema: Any) -> Any:
    """The grammar of a body's `grammar`, or its `json_schema`; raises ApiError."""
    if schema is None:
        return grammar
    wanted = AnswerSchema(schema or {"type": "object"}, "json_schema", strict=False)
    return await reply_grammar(state.sandbox, _PLAIN, Choice(()), wanted)


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


Prompts = Annotated[
    list[Any],
    BeforeValidator(as_prompts, json_schema_input_type=str | list[Any] | dict[str, Any]),
    Field(min_length=1, max_length=_MAX_PROMPTS, description="Text, token ids, both in a row, or a list of prompts."),
]


class CompletionRequest(GenerationFields):
    """Prompts to continue, as they are: no chat template."""

    prompt: Prompts
    echo: bool = Field(False, description="True: the prompt goes before its completion. Not together with `logprobs`.")
    suffix: str | None = Field(
        None, max_length=2**20, description="What follows the completion; needs a model that fills in the middle."
    )
    logprobs: int | None = Field(None, ge=0, le=20, description="Log probabilities of the tokens and so many others.")
    json_schema: Any = Field(None, description="The answer follows it. Not together with `grammar`.")
    best_of: int | None = Field(None, description="Only equal to `n`.")

    @model_validator(mode="before")
    @classmethod
    def _probabilities(cls, body: Any) -> Any:
        return renamed(body, {"n_probs": "logprobs"})

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.best_of not in (None, self.n):
            raise unsupported("best_of", f"best_of: only best_of = n ({self.n}) is supported")
        if self.grammar and self.json_schema is not None:
            raise unsupported("grammar", "grammar: not together with json_schema")
        if self.echo and self.logprobs is not None:
            raise unsupported("echo", "echo: not together with logprobs: those of a prompt are not computed")
        return self


@router.post("/v1/completions", response_class=Response)
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue each prompt."""
    state = state_of(request)
    state.check_model(body.model, request.state.key)
    await resolve_sampling(state, body)
    body.prompt = await resolve_prompts(state, body.prompt)
    body.grammar = await grammar_of(state, body.grammar, body.json_schema)
    requests = [
        Generate(
            id=0,
            prompt=_with_suffix(state.model_info(), prompt, body.suffix),
            max_tokens=most_tokens(state, body.max_tokens),
            stop=body.stop or [],
            sampling=body.sampling(index),
            logprobs=body.logprobs,
            cache_prompt=body.cache_prompt,
        )
        for prompt in body.prompt
        for index in range(body.n)
    ]
    options = Options.of(body, state, requests)
    echo = await texts_of(state, body.prompt, body.n) if body.echo else [""] * len(requests)
    shape = CompletionShape(options, logprobs=body.logprobs is not None, echo=echo)
    return await answer(request, run_of(request, requests, body.n), shape, stream=body.stream)


def _with_suffix(model: ModelInfo, prompt: str | list[int], suffix: str | None) -> str | list[int]:
    """The prompt in the form of models that fill in the middle: prefix, suffix, and what is between them comes last."""
    if suffix is None:
        return prompt
    if model.fim is None:
        message = "suffix: this model does not fill in the middle: its vocabulary has no tokens for that"
        raise ApiError(400, message, param="suffix", code="unsupported")
    if not isinstance(prompt, str):
        raise ApiError(400, "suffix: only with prompts that are text", param="suffix", code="unsupported")
    before, after, middle = model.fim
    return f"{before}{prompt}{after}{suffix}{middle}"
