"""What every request passes through: an id, one log line, the keys, the body's size limit, the server's readiness.

Plain ASGI: starlette's BaseHTTPMiddleware would put a task and a queue into every stream.
"""

from __future__ import annotations

import math
import re
import time
import uuid
from collections.abc import Sequence

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamaherd_server.auth import ANONYMOUS, Key, KeyStore
from llamaherd_server.error_responses import error_response
from llamaherd_server.errors import ApiError
from llamaherd_server.generation import Text
from llamaherd_server.lifecycle import Lifecycle
from llamaherd_server.meter import Usage
from llamaherd_server.metrics import Metrics
from llamaherd_server.settings import is_loopback

log = structlog.get_logger()

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Probes and the documentation tell nothing that a key protects.
_OPEN = frozenset({"/livez", "/readyz", "/health", "/docs", "/openapi.json"})
# What tells who looks from this machine how the server does, without a key.
_LOCAL = frozenset({"/", "/metrics"})
# What machines ask for all the time is not worth a line.
_QUIET = _OPEN | _LOCAL


class RequestLog:
    """What the line of one request says, filled in as it becomes known."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.arrived = time.perf_counter()
        self.key: str | None = None
        self.client_gone = False
        self._usage: Usage | None = None
        self._texts: Sequence[Text] = ()

    def follow(self, usage: Usage, texts: Sequence[Text] = ()) -> None:
        """Tell this usage, and these texts, as they stand at the end of the request."""
        self._usage = usage
        self._texts = texts

    def fields(self) -> dict[str, object]:
        fields: dict[str, object] = {"request_id": self.request_id, "key": self.key}
        if self.client_gone:
            fields["client_gone"] = True
        if usage := self._usage:
            fields |= {
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": usage.cached_tokens,
                "completion_tokens": usage.completion_tokens,
                "queued_ms": _milliseconds(usage.queued_s),
                "ttft_ms": _milliseconds(usage.ttft_s),
            }
        if self._texts:
            fields["prompts"] = [text.prompt for text in self._texts]
            fields["outputs"] = ["".join(text.output) for text in self._texts]
        return fields


class RequestContext:
    """Gives each request its id (the client's own where it is well-formed), and one log line and count at its end."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        record = RequestLog(given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex)
        scope.setdefault("state", {})["log"] = record
        status = 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = record.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            # The route's pattern, not the path: paths that clients make up must not become metrics.
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.responses.labels(scope["method"], path, status).inc()
            if scope["path"] not in _QUIET:
                took_ms = _milliseconds(time.perf_counter() - record.arrived)
                log.info("request", method=scope["method"], path=path, status=status, ms=took_ms, **record.fields())


class Gate:
    """Lets in who has a key, when the server can serve, with a body of bounded size. Whatever is not open is closed."""

    def __init__(self, app: ASGIApp, keys: KeyStore | None, lifecycle: Lifecycle, max_body_bytes: int) -> None:
        self._app = app
        self._keys = keys
        self._lifecycle = lifecycle
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _OPEN:
            await self._app(scope, receive, send)
            return
        try:
            scope["state"]["key"] = key = self._authenticate(scope)
            scope["state"]["log"].key = key.name
            self._check_served(scope)
        except ApiError as error:
            await error_response(error, scope["path"])(scope, receive, send)
            return
        with self._lifecycle.tracked():
            await self._app(scope, self._bounded(receive), send)

    def _authenticate(self, scope: Scope) -> Key:
        headers = Headers(scope=scope)
        local = is_loopback(scope["client"][0]) and "x-forwarded-for" not in headers
        path = scope["path"]
        if path in _LOCAL and local:
            return ANONYMOUS
        if self._keys is None:
            if path.startswith("/admin") and not local:
                raise ApiError(403, "without keys, /admin is for this machine only", code="admin_required")
            return ANONYMOUS
        token = _token(headers)
        if token is None:
            raise _unauthorized("no API key: send Authorization: Bearer <key>")
        key = self._keys.find(token)
        if key is None:
            raise _unauthorized("the API key is unknown or has expired")
        if path.startswith("/admin") and not key.admin:
            raise ApiError(403, f"key {key.name!r} is no admin key", code="admin_required")
        return key

    def _check_served(self, scope: Scope) -> None:
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_body_bytes:
            raise self._too_large()
        api = scope["path"] not in _LOCAL and not scope["path"].startswith("/admin")
        if api and (refusal := self._lifecycle.refusal()):
            raise refusal

    def _bounded(self, receive: Receive) -> Receive:
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise self._too_large()
            return message

        return bounded

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._max_body_bytes} bytes", code="body_too_large")


def _token(headers: Headers) -> str | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key")


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _milliseconds(seconds: float) -> float | None:
    return None if math.isnan(seconds) else round(seconds * 1000, 1)
