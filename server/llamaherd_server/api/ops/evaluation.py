"""POST /admin/logprobs: how probable the model finds given texts, to compare releases, models and KV types by."""

from __future__ import annotations

import asyncio
import math
from array import array
from functools import partial
from typing import Annotated, Any, get_args

from fastapi import APIRouter, Request, Response
from pydantic import Field

from llamaherd_server.api.answer import json_response, unless_gone
from llamaherd_server.api.fields import Body
from llamaherd_server.api.llamacpp.tokenize import TokenId
from llamaherd_server.api.routing import ModelRoute
from llamaherd_server.api.state import AppState, state_of
from llamaherd_server.chat import template
from llamaherd_server.errors import ApiError
from llamaherd_server.http.json_body import on_thread
from llamaherd_server.serving.generation import late_error
from llamaherd_server.wire.engine_settings import KvType
from llamaherd_server.wire.evaluation import Evaluate, Evaluated, EvaluatedInput, Evaluation
from llamaherd_server.wire.text import piece_text

router = APIRouter(route_class=ModelRoute)

_MAX_INPUTS = 256
_MAX_TOP = 32
_MAX_TOKENS = 2**16  # of all inputs
_MAX_ROWS = 2**12  # of all inputs: each is a pass over the vocabulary, and `top` entries of the answer
_KvTypes = Annotated[str, Field(pattern="^(" + "|".join(get_args(KvType)) + ")$")]
_Tokens = Annotated[list[TokenId], Field(max_length=_MAX_TOKENS)]


class EvaluationInput(Body):
    """A text, and where its probabilities begin."""

    prompt: str | _Tokens = Field(description="Text, such as /apply-template returns it, or token ids.")
    answer: str | _Tokens | None = Field(
        None, description="What follows the prompt; with it, only its tokens are evaluated. Text is plain text."
    )


class LogprobsRequest(Body):
    """Texts to evaluate, token by token."""

    inputs: list[EvaluationInput] = Field(min_length=1, max_length=_MAX_INPUTS, description="The texts.")
    model: str | None = Field(None, description="A name of /v1/models; left out: the first one.")
    top: int = Field(16, ge=1, le=_MAX_TOP, description="So many of the most likely tokens at each position.")
    kv_type_k: _KvTypes | None = Field(None, description="Type of the keys it is computed with; left out: as served.")
    kv_type_v: _KvTypes | None = Field(None, description="Type of the values; left out: as served.")


@router.post("/admin/logprobs", response_class=Response)
async def logprobs(body: LogprobsRequest, request: Request) -> Response:
    """Log probabilities of each text's tokens and of the most likely ones in their place, computed beside requests.

    `logprobs` has one number for each of `tokens`; `top` one list more, of what may follow the last token: pairs of a
    token id and its log probability. `pieces` has the tokens' texts, or bytes.
    """
    state = state_of(request)
    inputs = [await _input(state, one) for one in body.inputs]
    _check_size(inputs)
    settings = state.engine.status().settings
    types = None
    if body.kv_type_k or body.kv_type_v:
        types = (body.kv_type_k or settings.kv_type_k, body.kv_type_v or settings.kv_type_v)
    top = min(body.top, state.model_info().n_vocab)
    try:
        async with asyncio.timeout(state.serving.limits.request_timeout_s):
            question = Evaluate(0, inputs, top, types)
            answer = await unless_gone(request.receive, state.engine.evaluate(question))
    except TimeoutError:
        raise late_error(state.serving.limits, whole=True) from None
    return json_response(await on_thread(partial(_answered, state.model_name, inputs, top, answer)))


async def _input(state: AppState, given: EvaluationInput) -> EvaluatedInput:
    """Raises EngineError. The prompt gets the BOS token where a chat's would."""
    prompt, answer = given.prompt, given.answer
    if isinstance(prompt, str):
        special = template.adds_special(state.model_info(), prompt)
        prompt = await state.engine.tokenize(prompt, add_special=special)
    if isinstance(answer, str):
        answer = await state.engine.tokenize(answer, parse_special=False)
    start = 1 if answer is None else len(prompt)
    if start < 1 or not prompt:
        raise ApiError(400, "inputs: a prompt is empty", param="inputs", code="invalid_value")
    return EvaluatedInput([*prompt, *(answer or [])], start)


def _check_size(inputs: list[EvaluatedInput]) -> None:
    """Raises ApiError for more than one answer may take."""
    tokens = sum(len(one.tokens) for one in inputs)
    rows = sum(len(one.tokens) - one.start + 1 for one in inputs)
    for count, most, what in ((tokens, _MAX_TOKENS, "tokens"), (rows, _MAX_ROWS, "evaluated positions")):
        if count > most:
            message = f"inputs have {count} {what}, at most {most} are allowed: send them in several requests"
            raise ApiError(400, message, param="inputs", code="invalid_value")


def _answered(model: str, inputs: list[EvaluatedInput], top: int, answer: Evaluated) -> dict[str, Any]:
    return {
        "object": "list",
        "model": model,
        "data": [_item(*both, top) for both in zip(inputs, answer.evaluations, strict=True)],
        "pieces": {str(token): piece_text(piece) for token, piece in answer.pieces.items()},
        "usage": {"prompt_tokens": sum(len(one.tokens) for one in inputs)},
    }


def _item(given: EvaluatedInput, found: Evaluation, top: int) -> dict[str, Any]:
    values = [None if math.isnan(value) else round(value, 5) for value in array("f", found.logprobs)]
    pairs = [*zip(array("i", found.top_tokens), (round(x, 5) for x in array("f", found.top_logprobs)), strict=True)]
    return {
        "tokens": given.tokens[given.start :],
        "logprobs": values[:-1],
        "top": [pairs[row : row + top] for row in range(0, len(pairs), top)],
    }
