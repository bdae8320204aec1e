"""Processes every request between the middleware and its endpoint."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from email.message import Message
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import TypeAdapter

from llamaherd_server.api.state import choose_model
from llamaherd_server.errors import ApiError
from llamaherd_server.http.json_body import validated


class ModelRoute(APIRoute):
    """Selects the model that a request names and validates the body within the limits of json_body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint = super().get_route_handler()
        field = self.body_field
        adapter: TypeAdapter[Any] | None = TypeAdapter(field.field_info.annotation) if field else None  # type: ignore[arg-type]  # FastAPI always sets it

        async def handler(request: Request) -> Response:
            if adapter is not None:
                await self.read(request)
            await choose_model(request)
            if adapter is not None:
                request = _Validated(request, await request.body(), await validated(request, adapter))
            return await endpoint(request)

        return handler

    async def read(self, request: Request) -> None:
        """Raise a 400 unless the body is sent as JSON, which json_body decodes."""
        _check_content_type(request)


class _Validated(Request):
    """A request whose JSON is already the endpoint's model instance, which FastAPI does not validate again."""

    def __init__(self, request: Request, body: bytes, value: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._bytes = body
        self._value = value

    async def body(self) -> bytes:
        return self._bytes

    async def json(self) -> Any:
        return self._value


def _check_content_type(request: Request) -> None:
    sent = request.headers.get("content-type", "none")
    message = Message()
    message["content-type"] = sent
    subtype = message.get_content_subtype()
    if message.get_content_maintype() != "application" or not (subtype == "json" or subtype.endswith("+json")):
        text = f"the body must be a JSON object sent with Content-Type: application/json, not {sent}"
        raise ApiError(400, text, code="invalid_content_type")
