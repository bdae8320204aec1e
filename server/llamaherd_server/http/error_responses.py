"""Error responses in the format of OpenAI's API, or of Anthropic's for its routes."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Scope

from llamaherd_server.errors import ApiError
from llamaherd_server.wire.errors import EngineError

# nginx's status for a client that closed the connection. It only appears in logs and metrics.
CLIENT_GONE = 499
# The server's own pydantic error types, whose messages already name the field.
_OWN_ERROR_TYPES = ("unknown_field", "unsupported")


class ErrorObject(BaseModel):
    """What went wrong."""

    message: str
    type: str = Field(description="invalid_request_error, authentication_error, rate_limit_error, server_error …")
    param: str | None = Field(description="The request field that caused the error.")
    code: str | None = Field(description="A machine-readable reason.")


class ErrorBody(BaseModel):
    """Every response other than a 2xx. A 429 or 503 has Retry-After."""

    error: ErrorObject


class MessagesErrorObject(BaseModel):
    """What went wrong, in the format of Anthropic's API."""

    type: str = Field(description="invalid_request_error, not_found_error, rate_limit_error, api_error …")
    message: str


class MessagesErrorBody(BaseModel):
    """Every response of Anthropic's routes other than a 2xx."""

    type: Literal["error"]
    error: MessagesErrorObject


def error_response(error: ApiError, scope: Scope) -> Response:
    """Return the response for `error` in the format of the request's route, and log its code with the request."""
    if log := scope.get("state", {}).get("log"):  # missing if the middleware itself failed
        log.error = error.code
    body = error.messages_body() if scope["path"].startswith("/v1/messages") else error.body()
    return Response(msgspec.json.encode(body), error.status_code, error.headers, "application/json")


def install(app: FastAPI) -> None:
    """Install handlers for all errors of `app`. Invalid requests get a 400, never FastAPI's 422."""
    app.exception_handler(RequestValidationError)(_on_validation_error)
    app.exception_handler(HTTPException)(_on_http_exception)
    app.exception_handler(EngineError)(_on_engine_error)
    app.exception_handler(UnicodeEncodeError)(_on_unpaired_surrogate)
    app.exception_handler(ClientDisconnect)(_on_disconnect)
    app.exception_handler(Exception)(_on_bug)


async def _on_http_exception(request: Request, error: HTTPException) -> Response:
    if not isinstance(error, ApiError):
        message = f"{request.method} {request.url.path}: {error.detail}"
        error = ApiError(error.status_code, message, headers=error.headers)
    return error_response(error, request.scope)


async def _on_engine_error(request: Request, error: EngineError) -> Response:
    return error_response(ApiError.of_engine(error), request.scope)


async def _on_unpaired_surrogate(request: Request, _: UnicodeEncodeError) -> Response:
    # JSON can contain an unpaired surrogate. In fields that are not typed as text, it is found only when encoded.
    error = ApiError(400, "a string in the body has an unpaired surrogate", code="invalid_value")
    return error_response(error, request.scope)


async def _on_disconnect(request: Request, _: ClientDisconnect) -> Response:
    request.state.log.client_gone = True
    return Response(status_code=CLIENT_GONE)


async def _on_bug(request: Request, _: Exception) -> Response:
    bug = ApiError(500, "internal error; the server's log has the details", code="internal")
    return error_response(bug, request.scope)


async def _on_validation_error(request: Request, error: RequestValidationError) -> Response:
    return error_response(_of_first(error.errors()[0], param_from=1), request.scope)


def of_validation(error: ValidationError) -> ApiError:
    """Return the 400 for an invalid body, with its first error."""
    return _of_first(error.errors(include_url=False, include_input=False)[0], param_from=0)


def _of_first(first: Any, param_from: int) -> ApiError:
    kind, message = first["type"], first["msg"].removeprefix("Value error, ")
    param = ".".join(map(str, first["loc"][param_from:])) or None
    if kind in _OWN_ERROR_TYPES:
        nested = f"{param}." if param and kind == "unknown_field" else ""
        return ApiError(400, message, param=nested + first["ctx"]["param"], code=kind)
    return ApiError(400, f"{param}: {message}" if param else message, param=param, code="invalid_value")
