"""Errors of HTTP requests. This module does not import FastAPI, because sandboxed children import it too."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException

from llamaherd_server.wire.errors import EngineError
from llamaherd_server.wire.protocol import ErrorCode

_ENGINE_STATUS: Mapping[ErrorCode, int] = {
    "context_length_exceeded": 400,
    "invalid_value": 400,
    "invalid_grammar": 400,
    "unsupported": 400,
    "does_not_fit": 400,
    # Not a 503, for which an edge tries the next host: the request may have crashed the engine.
    "engine_crashed": 500,
    "engine_stopped": 503,
    "internal": 500,
}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_MESSAGES_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
# Maximum characters of names and messages in responses; both may contain text that a client sent.
_MAX_NAME = 80
_MAX_MESSAGE = 2000
# An engine that restarts is ready again after it has reloaded the weights from the page cache.
_RETRY_AFTER_RESTART_S = 5


class ApiError(HTTPException):
    """An error response. `retry_after` is in whole seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
        details: Mapping[str, int] | None = None,
    ) -> None:
        retry = {} if retry_after is None else {"Retry-After": str(retry_after)}
        super().__init__(status, message[:_MAX_MESSAGE], {**retry, **(headers or {})})
        self.code = code
        self.param = param
        self.details = details or {}

    @classmethod
    def of_engine(cls, error: EngineError) -> ApiError:
        """Convert an engine's error to an HTTP error."""
        status = _ENGINE_STATUS[error.code]
        retry_after = _RETRY_AFTER_RESTART_S if status == 503 else None
        return cls(
            status, error.message, code=error.code, param=error.param, retry_after=retry_after, details=error.details
        )

    def body(self) -> dict[str, Any]:
        """Return the JSON object for a response, or for an event in a stream that has started."""
        kind = _TYPES.get(self.status_code) or ("server_error" if self.status_code >= 500 else "invalid_request_error")
        if self.code == "context_length_exceeded":
            kind = "exceed_context_size_error"  # llama-server's type, which its clients check
        elif self.code == "insufficient_quota":
            kind = self.code  # OpenAI's type
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code, **self.details}}

    def messages_body(self) -> dict[str, Any]:
        """Return the JSON object in the format of Anthropic's API: https://docs.anthropic.com/en/api/errors"""
        kind = _MESSAGES_TYPES.get(self.status_code, "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.detail}}


def shown(name: str) -> str:
    """Quote and truncate a name that a client sent, for a message."""
    return repr(name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}…")


def nearest(name: str, known: Collection[str]) -> str:
    """Return a hint to append after an unknown name: the most similar known name, or an empty string."""
    close = difflib.get_close_matches(name[:_MAX_NAME], known, n=1)
    return f": did you mean {close[0]!r}?" if close else ""


def unsupported(param: str, message: str) -> PydanticCustomError:
    """Return a validator's error for a `param` that is known but not supported."""
    return PydanticCustomError("unsupported", "{message}", {"param": param, "message": message})


def unknown_field(name: str, known: Collection[str]) -> PydanticCustomError:
    """Return a validator's error for a field that this server does not know."""
    message = f"unknown field {shown(name)}{nearest(name, known)}"
    return PydanticCustomError("unknown_field", "{message}", {"param": name[:_MAX_NAME], "message": message})
