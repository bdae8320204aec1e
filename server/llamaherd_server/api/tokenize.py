"""POST /tokenize and /detokenize, as llama-server has them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import Field

from llamaherd_server.api.answer import json_response
from llamaherd_server.api.fields import Body
from llamaherd_server.api.routing import ModelRoute
from llamaherd_server.api.state import state_of

router = APIRouter(route_class=ModelRoute)


class TokenizeRequest(Body):
    """Text to split into tokens."""

    content: str = Field(description="The text.")
    add_special: bool = Field(False, description="True: with the tokens that a prompt begins with, such as BOS.")
    parse_special: bool = Field(True, description="False: control tokens in the text are plain text.")


class DetokenizeRequest(Body):
    """Tokens to join to text."""

    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(description="Token ids.")


@router.post("/tokenize", response_class=Response)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The model's tokens of a text."""
    engine = state_of(request).engine
    tokens = await engine.tokenize(body.content, add_special=body.add_special, parse_special=body.parse_special)
    return json_response({"tokens": tokens})


@router.post("/detokenize", response_class=Response)
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of tokens."""
    return json_response({"content": await state_of(request).engine.detokenize(body.tokens)})
