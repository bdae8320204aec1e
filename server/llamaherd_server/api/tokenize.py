"""POST /tokenize and /detokenize, as llama-server has them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import Field

from llamaherd_server.api.answer import json_response
from llamaherd_server.api.fields import Body
from llamaherd_server.api.routing import ModelRoute
from llamaherd_server.api.state import state_of
from llamaherd_server.errors import ApiError

router = APIRouter(route_class=ModelRoute)

_MAX_PIECES = 4096


class TokenizeRequest(Body):
    """Text to split into tokens."""

    content: str = Field(description="The text.")
    add_special: bool = Field(False, description="True: with the tokens that a prompt begins with, such as BOS.")
    parse_special: bool = Field(True, description="False: control tokens in the text are plain text.")
    with_pieces: bool = Field(False, description="True: each token as an object with its `id` and its text as `piece`.")


class DetokenizeRequest(Body):
    """Tokens to join to text."""

    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(description="Token ids.")


@router.post("/tokenize", response_class=Response)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The model's tokens of a text."""
    engine = state_of(request).engine
    tokens = await engine.tokenize(body.content, add_special=body.add_special, parse_special=body.parse_special)
    if not body.with_pieces:
        return json_response({"tokens": tokens})
    if len(tokens) > _MAX_PIECES:
        message = f"with_pieces: {len(tokens)} tokens are more than {_MAX_PIECES}: send less text"
        raise ApiError(400, message, param="content", code="invalid_value")
    pieces = [{"id": token, "piece": await engine.detokenize([token])} for token in tokens]
    return json_response({"tokens": pieces})


@router.post("/detokenize", response_class=Response)
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of tokens."""
    return json_response({"content": await state_of(request).engine.detokenize(body.tokens)})
