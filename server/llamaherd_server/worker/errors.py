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


class DecodeFailed(RuntimeError):
    """llama_decode failed in a way that leaves the context unusable."""
