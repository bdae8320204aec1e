"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any, Literal

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from llamaherd_server.engine.base import EngineError
from llamaherd_server.protocol import ErrorCode

_ENGINE_STATUS: Mapping[ErrorCode, int] = {
    "context_length_exceeded": 400,
    "invalid_value": 400,
    "invalid_grammar": 400,
    "unsupported": 400,
    "does_not_fit": 400,
    "engine_crashed": 503,
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
# pydantic error types that this package raises itself; their messages name the field already.
_OWN_KINDS = ("unknown_field", "unsupported")
# An engine that died is back after a reload of the weights from the page cache.
_RETRY_AFTER_CRASH_S = 5


class ErrorObject(BaseModel):
    """What went wrong."""

    message: str
    type: str = Field(description="invalid_request_error, authentication_error, rate_limit_error, server_error …")
    param: str | None = Field(description="The field of the request that is to blame.")
    code: str | None = Field(description="The reason, for programs.")


class ErrorBody(BaseModel):
    """Every answer other than a 2xx. A 429 and a 503 come with Retry-After."""

    error: ErrorObject


class MessagesErrorObject(BaseModel):
    """What went wrong, in the words of Anthropic's API."""

    type: str = Field(description="invalid_request_error, not_found_error, rate_limit_error, api_error …")
    message: str


class MessagesErrorBody(BaseModel):
    """Every answer of Anthropic's routes other than a 2xx."""

    type: Literal["error"]
    error: MessagesErrorObject


class ApiError(HTTPException):
    """An answer other than the one asked for. `retry_after` is in whole seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        retry = {} if retry_after is None else {"Retry-After": str(retry_after)}
        super().__init__(status, message, {**retry, **(headers or {})})
        self.code = code
        self.param = param

    @classmethod
    def of_engine(cls, error: EngineError) -> ApiError:
        """The HTTP face of what an engine raised."""
        status = _ENGINE_STATUS[error.code]
        retry_after = _RETRY_AFTER_CRASH_S if status == 503 else None
        return cls(status, error.message, code=error.code, param=error.param, retry_after=retry_after)

    def body(self) -> dict[str, Any]:
        """The JSON object, for a response or for an event of a stream that has begun."""
        kind = _TYPES.get(self.status_code) or ("server_error" if self.status_code >= 500 else "invalid_request_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def messages_body(self) -> dict[str, Any]:
        """The same in the shape of Anthropic's API: https://docs.anthropic.com/en/api/errors"""
        kind = _MESSAGES_TYPES.get(self.status_code, "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.detail}}

    def response(self, path: str) -> Response:
        """The answer to a request for `path`."""
        body = self.messages_body() if path.startswith("/v1/messages") else self.body()
        return Response(msgspec.json.encode(body), self.status_code, self.headers, "application/json")


def nearest(name: str, known: Collection[str]) -> str:
    """A hint to put after an unknown name: the right name it resembles most, or nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {close[0]!r}?" if close else ""


def unsupported(param: str, message: str) -> PydanticCustomError:
    """For a validator: `param` is known but cannot be honoured."""
    return PydanticCustomError("unsupported", "{message}", {"param": param, "message": message})


def unknown_field(name: str, known: Collection[str]) -> PydanticCustomError:
    """For a validator: the body has a field that this server does not know."""
    message = f"unknown field {name!r}{nearest(name, known)}"
    return PydanticCustomError("unknown_field", "{message}", {"param": name, "message": message})


def install(app: FastAPI) -> None:
    """Answer every error of `app` in OpenAI's shape; what a client sent wrong is a 400, never a 422."""
    app.exception_handler(RequestValidationError)(_on_validation_error)
    app.exception_handler(HTTPException)(_on_http_exception)
    app.exception_handler(EngineError)(_on_engine_error)
    app.exception_handler(UnicodeEncodeError)(_on_half_a_character)
    app.exception_handler(ClientDisconnect)(_on_client_gone)
    app.exception_handler(Exception)(_on_bug)


async def _on_http_exception(request: Request, error: HTTPException) -> Response:
    if not isinstance(error, ApiError):
        message = f"{request.method} {request.url.path}: {error.detail}"
        error = ApiError(error.status_code, message, headers=error.headers)
    return error.response(request.url.path)


async def _on_engine_error(request: Request, error: EngineError) -> Response:
    return ApiError.of_engine(error).response(request.url.path)


async def _on_half_a_character(request: Request, _: UnicodeEncodeError) -> Response:
    # JSON can spell half of a surrogate pair; what is not typed as text keeps it until it is encoded.
    error = ApiError(400, "a text in the body has an unpaired surrogate", code="invalid_value")
    return error.response(request.url.path)


async def _on_client_gone(request: Request, _: ClientDisconnect) -> Response:
    request.state.log.client_gone = True
    return Response(status_code=499)  # nginx's number for it; nobody reads this


async def _on_bug(request: Request, _: Exception) -> Response:
    return ApiError(500, "internal error; the server's log has the details", code="internal").response(request.url.path)


async def _on_validation_error(request: Request, error: RequestValidationError) -> Response:
    return _of_validation(error, request.headers.get("content-type", "none")).response(request.url.path)


def _of_validation(error: RequestValidationError, sent: str) -> ApiError:
    first = error.errors()[0]
    kind = first["type"]
    param = ".".join(map(str, first["loc"][1:])) or None
    if kind == "json_invalid":
        message = f"the body is not valid JSON: {first['ctx']['error']} at character {first['loc'][1]}"
        return ApiError(400, message, code="invalid_json")
    if isinstance(error.body, bytes):
        message = f"the body must be a JSON object sent with Content-Type: application/json, not {sent}"
        return ApiError(400, message, code="invalid_content_type")
    message = first["msg"].removeprefix("Value error, ")
    if kind in _OWN_KINDS:
        nested = f"{param}." if param and kind == "unknown_field" else ""
        return ApiError(400, message, param=nested + first["ctx"]["param"], code=kind)
    return ApiError(400, f"{param}: {message}" if param else message, param=param, code="invalid_value")
