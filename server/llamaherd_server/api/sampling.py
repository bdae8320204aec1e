"""Completes a request's sampling fields for the engine: adds the model's defaults and tokenizes texts."""

from __future__ import annotations

from llamaherd_server.api.fields import SamplingFields
from llamaherd_server.api.state import AppState
from llamaherd_server.errors import ApiError

_MAX_TEXTS = 256


async def resolve_sampling(state: AppState, body: SamplingFields) -> None:
    """Fill in the model's defaults and replace texts in the body's `logit_bias` by their tokens. Raises ApiError.

    Each token of a text gets the text's bias, as in llama-server.
    """
    defaults = state.sampling_defaults()
    for name in SamplingFields.model_fields.keys() & defaults.keys():
        if getattr(body, name) is None:
            setattr(body, name, defaults[name])
    given = body.logit_bias or {}
    texts = [token for token in given if isinstance(token, str)]
    if len(texts) > _MAX_TEXTS:
        message = f"logit_bias: {len(texts)} texts are more than {_MAX_TEXTS}: send token ids"
        raise ApiError(400, message, param="logit_bias", code="invalid_value")
    for text in texts:
        tokens = await state.engine.tokenize(text, parse_special=False)
        given |= dict.fromkeys(tokens, given.pop(text))


def most_tokens(state: AppState, given: int | None) -> int | None:
    """Return the token limit of an answer: the request's, or the model's default; None: until the context is full."""
    return given or state.sampling_defaults().get("max_tokens")
