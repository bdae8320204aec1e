"""Exceptions that fail a request, in a worker or in the front end, and one that ends a worker."""

from __future__ import annotations

from llamaherd_server.wire.protocol import ErrorCode


class RequestError(ValueError):
    """A request cannot be served; others are unaffected. `param` names the field, `details` go into the response."""

    def __init__(self, code: ErrorCode, param: str | None, message: str, details: dict[str, int] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param
        self.message = message
        self.details = details


def too_long(tokens: int, room: int, about: str = "") -> RequestError:
    """Return the error for a prompt that does not fit into a slot; `about` qualifies the count, such as "at least "."""
    message = f"the prompt has {about}{tokens} tokens, a slot holds {room}: shorten it or raise ctx_per_slot"
    return RequestError("context_length_exceeded", "prompt", message, {"n_prompt_tokens": tokens, "n_ctx": room})


class DecodeFailed(RuntimeError):
    """llama_decode failed and left the context unusable."""


class EngineError(Exception):
    """A request to the engine failed; `code` says why, and whether the client or the server is at fault."""

    def __init__(
        self, code: ErrorCode, message: str, param: str | None = None, details: dict[str, int] | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.details = details or {}
