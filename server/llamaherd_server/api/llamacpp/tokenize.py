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
from llamaherd_server.wire.text import piece_text

router = APIRouter(route_class=ModelRoute)

_MAX_PIECES = 65536
_MAX_PARTS = 4096
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]


class TokenizeRequest(Body):
    """Text to split into tokens."""

    content: str | list[str | TokenId] = Field(description="Text, or texts and token ids in a row.")
    model: str | None = Field(None, description="A name of /v1/models; left out: the model that is served.")
    add_special: bool = Field(False, description="True: with the tokens that a prompt begins with, such as BOS.")
    parse_special: bool = Field(True, description="False: control tokens in the text are plain text.")
    with_pieces: bool = Field(
        False, description="True: each token as an object with its `id` and its text, or bytes, as `piece`."
    )


class DetokenizeRequest(Body):
    """Tokens to join to text."""

    tokens: list[TokenId] = Field(description="Token ids.")
    model: str | None = Field(None, description="A name of /v1/models; left out: the model that is served.")


@router.post("/tokenize", response_class=Response)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The model's tokens of a text."""
    engine = state_of(request).engine
    parts = body.content if isinstance(body.content, list) else [body.content]
    texts = [place for place, part in enumerate(parts) if isinstance(part, str)]
    if len(texts) > _MAX_PARTS:
        message = f"content: {len(texts)} texts are more than {_MAX_PARTS}: join some"
        raise ApiError(400, message, param="content", code="invalid_value")
    tokens: list[int] = []
    for place, part in enumerate(parts):
        if isinstance(part, int):
            tokens.append(part)
        else:
            special = {"add_special": body.add_special and place == texts[0], "parse_special": body.parse_special}
            tokens += await engine.tokenize(part, **special)
    if not body.with_pieces:
        return json_response({"tokens": tokens})
    if len(tokens) > _MAX_PIECES:
        message = f"with_pieces: {len(tokens)} tokens are more than {_MAX_PIECES}: send less text"
        raise ApiError(400, message, param="content", code="invalid_value")
    pieces = await engine.pieces(tokens)
    answered = [{"id": token, "piece": piece_text(piece)} for token, piece in zip(tokens, pieces, strict=True)]
    return json_response({"tokens": answered})


@router.post("/detokenize", response_class=Response)
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of tokens."""
    return json_response({"content": await state_of(request).engine.detokenize(body.tokens)})
