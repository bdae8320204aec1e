"""POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, Self

from fastapi import APIRouter, Request, Response
from pydantic import BeforeValidator, Field, model_validator

from llamaherd_server.api.answer import answer, run_of
from llamaherd_server.api.bias import resolve_biases
from llamaherd_server.api.completion_shape import CompletionShape
from llamaherd_server.api.fields import GenerationFields
from llamaherd_server.api.routing import ModelRoute
from llamaherd_server.api.state import AppState, state_of
from llamaherd_server.api.wire import Options
from llamaherd_server.errors import ApiError, unsupported
from llamaherd_server.protocol import Generate, ModelInfo

router = APIRouter(route_class=ModelRoute)

_MAX_PROMPTS = 128


def as_prompts(prompt: Any) -> Any:
    """OpenAI's four forms (text, texts, tokens, lists of tokens) as a list of prompts, each text or tokens."""
    prompts = prompt if isinstance(prompt, list) and prompt and not _is_token(prompt[0]) else [prompt]
    for one in prompts:
        tokens = isinstance(one, list) and one and all(_is_token(token) for token in one)
        if not (isinstance(one, str) or tokens):
            raise ValueError("must be a text, a list of texts, a list of token ids, or a list of such lists")
    return prompts


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


class CompletionRequest(GenerationFields):
    """Prompts to continue, as they are: no chat template."""

    prompt: Annotated[
        list[Any], BeforeValidator(as_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]])
    ] = Field(max_length=_MAX_PROMPTS, description="Text or token ids, one prompt or a list.")
    echo: bool = Field(False, description="True: the prompt goes before its completion. Not together with `logprobs`.")
    suffix: str | None = Field(
        None, max_length=2**20, description="What follows the completion; needs a model that fills in the middle."
    )
    logprobs: int | None = Field(None, ge=0, le=20, description="Log probabilities of the tokens and so many others.")
    best_of: int | None = Field(None, description="Only equal to `n`.")

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.best_of not in (None, self.n):
            raise unsupported("best_of", f"best_of: only best_of = n ({self.n}) is supported")
        if self.echo and self.logprobs is not None:
            raise unsupported("echo", "echo: not together with logprobs: those of a prompt are not computed")
        return self


@router.post("/v1/completions", response_class=Response)
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue each prompt."""
    state = state_of(request)
    state.check_model(body.model, request.state.key)
    await resolve_biases(state, body)
    requests = [
        Generate(
            id=0,
            prompt=_with_suffix(state.model_info(), prompt, body.suffix),
            max_tokens=body.max_tokens,
            stop=body.stop or [],
            sampling=body.sampling(index),
            logprobs=body.logprobs,
            cache_prompt=body.cache_prompt,
        )
        for prompt in body.prompt
        for index in range(body.n)
    ]
    options = Options.of(body, state.model_name)
    echo = await _echoes(state, body)
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


async def _echoes(state: AppState, body: CompletionRequest) -> list[str]:
    texts = []
    for prompt in body.prompt:
        text = ""
        if body.echo:
            text = prompt if isinstance(prompt, str) else await state.engine.detokenize(prompt)
        texts += [text] * body.n
    return texts
