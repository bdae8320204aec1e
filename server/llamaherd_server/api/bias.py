"""Biases on text, as llama-server takes them: each of the text's tokens gets the bias."""

from __future__ import annotations

from llamaherd_server.api.fields import SamplingFields
from llamaherd_server.api.state import AppState
from llamaherd_server.errors import ApiError

_MAX_TEXTS = 256


async def resolve_biases(state: AppState, body: SamplingFields) -> None:
    """Replace texts in the body's `logit_bias` by their tokens; raises ApiError."""
    given = body.logit_bias or {}
    texts = [token for token in given if isinstance(token, str)]
    if len(texts) > _MAX_TEXTS:
        message = f"logit_bias: {len(texts)} texts are more than {_MAX_TEXTS}: send token ids"
        raise ApiError(400, message, param="logit_bias", code="invalid_value")
    for text in texts:
        tokens = await state.engine.tokenize(text, parse_special=False)
        given |= dict.fromkeys(tokens, given.pop(text))
