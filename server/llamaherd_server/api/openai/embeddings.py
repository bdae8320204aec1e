"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
import math
from array import array
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import BeforeValidator, Field, model_validator

from llamaherd_server.api.answer import json_response, unless_gone
from llamaherd_server.api.fields import Body
from llamaherd_server.api.openai.completions import as_prompts, resolve_prompts
from llamaherd_server.api.routing import ModelRoute
from llamaherd_server.api.state import state_of
from llamaherd_server.errors import ApiError
from llamaherd_server.http.json_body import on_thread
from llamaherd_server.serving.admission import Ticket
from llamaherd_server.serving.generation import CHARS_PER_TOKEN, late_error, prompt_tokens
from llamaherd_server.serving.meter import Usage
from llamaherd_server.wire.protocol import Embed, Embedded

router = APIRouter(route_class=ModelRoute)

MOST_INPUTS = 2048  # OpenAI's own limit


class EmbeddingsRequest(Body):
    """Texts to turn into vectors of length 1."""

    input: Annotated[
        list[Any], BeforeValidator(as_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]])
    ] = Field(min_length=1, max_length=MOST_INPUTS, description="Text or token ids, one input or a list.")
    model: str | None = Field(None, description="A name of /v1/models; left out: the model that is served.")
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="base64: the vector's 32-bit floats, little-endian."
    )
    dimensions: int | None = Field(
        None, ge=1, description="Keep so many of the vector's first numbers, and make its length 1 again."
    )
    user: str | None = Field(None, description="Accepted and ignored.")


class LlamaEmbeddingsRequest(EmbeddingsRequest):
    """The same for llama-server's own routes, where the input may be called `content`."""

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, body: Any) -> Any:
        if isinstance(body, dict) and "input" not in body:
            return {"input" if name == "content" else name: value for name, value in body.items()}
        return body


@router.post("/v1/embeddings", response_class=Response)
async def embeddings(body: EmbeddingsRequest, request: Request) -> Response:
    """The embedding of each input, in the order of the inputs."""
    state = state_of(request)
    state.check_model(body.model, request.state.key)
    n_embd = state.model_info().n_embd
    if body.dimensions is not None and body.dimensions > n_embd:
        message = f"dimensions {body.dimensions} is more than the model's {n_embd}"
        raise ApiError(400, message, param="dimensions", code="invalid_value")
    answer = await compute(request, Embed(0, await resolve_prompts(state, body.input)))
    data = await on_thread(partial(_items, answer.vectors, body.dimensions, body.encoding_format))
    return json_response({"object": "list", "model": state.model_name, "data": data, "usage": input_usage(answer)})


@router.post("/embeddings", response_class=Response)
@router.post("/embedding", response_class=Response)
async def llama_embeddings(body: LlamaEmbeddingsRequest, request: Request) -> Response:
    """The same as llama-server's own routes answer it."""
    state = state_of(request)
    state.check_model(body.model, request.state.key)
    answer = await compute(request, Embed(0, await resolve_prompts(state, body.input)))
    items = await on_thread(partial(_llama_items, answer.vectors))
    return json_response(items)


def _llama_items(vectors: list[bytes]) -> list[dict[str, Any]]:
    return [{"index": index, "embedding": [floats(vector).tolist()]} for index, vector in enumerate(vectors)]


async def compute(request: Request, question: Embed) -> Embedded:
    """Queue the question, within its key's limits, and wait for the answer; raises ApiError and EngineError."""
    serving, key = state_of(request).serving, request.state.key
    usage = Usage()
    request.state.log.follow(usage)
    tokens = await prompt_tokens(serving.engine, question.inputs) if key.counts_tokens else 0
    queue = serving.embeddings

    async def answered(ticket: Ticket) -> Embedded:
        async with queue.place(ticket, lambda: usage.prompt_tokens):
            answer = await serving.engine.embed(question)
            usage.prompt_tokens = answer.tokens
            return answer

    with serving.reserve(key, usage, tokens=tokens, costs=[_cost(question)], to=queue) as [ticket]:
        try:
            async with asyncio.timeout(serving.limits.request_timeout_s):
                return await unless_gone(request.receive, answered(ticket))
        except TimeoutError:
            raise late_error(serving.limits, whole=True) from None


def input_usage(answer: Embedded) -> dict[str, int]:
    return {"prompt_tokens": answer.tokens, "total_tokens": answer.tokens}


def floats(vector: bytes) -> array[float]:
    """An answer's numbers."""
    return array("f", vector)


def _cost(question: Embed) -> float:
    return sum(len(one) / (CHARS_PER_TOKEN if isinstance(one, str) else 1) for one in question.inputs)


def _items(vectors: list[bytes], dimensions: int | None, encoding: str) -> list[msgspec.Raw]:
    """The answer's objects as JSON, one by one: millions of numbers are long in the making."""
    return [
        msgspec.Raw(
            msgspec.json.encode(
                {"object": "embedding", "index": index, "embedding": _encoded(_cut(vector, dimensions), encoding)}
            )
        )
        for index, vector in enumerate(vectors)
    ]


def _cut(vector: bytes, dimensions: int | None) -> array[float]:
    values = floats(vector)[:dimensions]
    if dimensions is None:
        return values
    norm = math.hypot(*values) or 1.0
    return array("f", (value / norm for value in values))


def _encoded(vector: array[float], encoding: str) -> list[float] | str:
    return vector.tolist() if encoding == "float" else base64.b64encode(vector).decode()
