"""What a single request did wrong, and what ends the worker."""

from __future__ import annotations

from llamaherd_server.protocol import ErrorCode


class RequestError(ValueError):
    """A request that cannot be done; it fails alone. `param` names the field; `details` go into the error object."""

    def __init__(self, code: ErrorCode, param: str | None, message: str, details: dict[str, int] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param
        self.message = message
        self.details = details


def too_long(tokens: int, room: int, about: str = "") -> RequestError:
    """A prompt that no slot has room for; `about` says how exactly its tokens were counted."""
    message = f"the prompt has {about}{tokens} tokens, a slot holds {room}: shorten it or raise ctx_per_slot"
    return RequestError("context_length_exceeded", "prompt", message, {"n_prompt_tokens": tokens, "n_ctx": room})


class DecodeFailed(RuntimeError):
    """llama_decode failed in a way that leaves the context unusable."""
