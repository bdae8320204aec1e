"""What fails a request, in a worker and in the front end, and what ends a worker."""

from __future__ import annotations

from llamaherd_server.wire.protocol import ErrorCode


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


class EngineError(Exception):
    """A request, or the engine itself, could not do what was asked; `code` says whose fault it is."""

    def __init__(
        self, code: ErrorCode, message: str, param: str | None = None, details: dict[str, int] | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.details = details or {}
