"""The middleware of every request: its id, log line, API key and limits, body, and the server's readiness.

Plain ASGI, because starlette's BaseHTTPMiddleware would add a task and a queue to every stream.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from urllib.parse import urlsplit

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamaherd_server.config.keys import ANONYMOUS, Key, KeyStore
from llamaherd_server.config.loopback import is_loopback
from llamaherd_server.config.settings import HttpSettings, LimitSettings
from llamaherd_server.errors import ApiError, shown
from llamaherd_server.http.error_responses import CLIENT_GONE, error_response
from llamaherd_server.process.turns import caller
from llamaherd_server.serving.generation import Text
from llamaherd_server.serving.lifecycle import Lifecycle
from llamaherd_server.serving.meter import Usage
from llamaherd_server.serving.metrics import Metrics
from llamaherd_server.serving.quota import SHARE_HEADER, Quotas

log = structlog.get_logger()

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Open without a key: probes and API documentation reveal nothing that a key protects.
_PUBLIC_PATHS = frozenset({"/livez", "/readyz", "/health", "/v1/health", "/docs", "/openapi.json"})
# The status page and the metrics need no key from this machine.
_LOCAL_PATHS = frozenset({"/", "/metrics"})
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
# nginx locations to which the edge may have a request redirected if this server's part of its key's limits is used up.
_ELSEWHERE = re.compile(r"@elsewhere_\d")
# How often timeouts are checked while a body does not arrive.
_BODY_POLL_S = 1.0
# Usage is also reported while a model loads.
_PATHS_WITHOUT_MODEL = frozenset({"/v1/usage"})
# Polled by machines: not logged.
_UNLOGGED_PATHS = _PUBLIC_PATHS | _LOCAL_PATHS


class RequestLog:
    """The data for one request's log line and trace, filled in as it becomes known.

    `models`: the model name in the request and the name of the model that serves it. `error`: the error's code.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.arrived = time.perf_counter()
        self.key: str | None = None
        self.client_gone = False
        self.models: tuple[str, str] | None = None
        self.streamed = False
        self.error: str | None = None
        self.usage: Usage | None = None
        self._texts: Sequence[Text] = ()

    def follow(self, usage: Usage, texts: Sequence[Text] = ()) -> None:
        """Log `usage` and `texts` with the values that they have at the end of the request."""
        self.usage = usage
        self._texts = texts

    def fields(self) -> dict[str, object]:
        fields: dict[str, object] = {"request_id": self.request_id, "key": self.key}
        if self.client_gone:
            fields["client_gone"] = True
        if usage := self.usage:
            fields |= {
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": usage.cached_tokens,
                "completion_tokens": usage.completion_tokens,
                "queued_ms": _milliseconds(usage.queued_s),
                "ttft_ms": _milliseconds(usage.ttft_s),
            }
            if usage.prompt_chars:
                fields |= {"prompt_chars": usage.prompt_chars, "prefixes": usage.prefixes}
        if self._texts:
            fields["prompts"] = [text.prompt for text in self._texts]
            fields["outputs"] = ["".join(text.output) for text in self._texts]
        return fields


class RequestContext:
    """Gives each request an id (the client's own if well-formed), and a log line and a count when it ends.

    `trace` is called with the same data: scope, record, route pattern, status. HEAD is handled like GET; uvicorn drops
    the body. Trailing slashes of the path are ignored.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, trace: Callable[[Scope, RequestLog, str, int], None] | None
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._trace = trace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = scope["method"]
        path = scope["path"].rstrip("/") or "/"
        scope = {**scope, "method": "GET" if method == "HEAD" else method, "path": path}
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
        except ClientDisconnect:
            status, record.client_gone = CLIENT_GONE, True
        finally:
            # The route's pattern, not the path, so that clients cannot create metrics with made-up paths.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.responses.labels(method, route, status).inc()
            if path not in _UNLOGGED_PATHS:
                took_ms = _milliseconds(time.perf_counter() - record.arrived)
                log.info("request", method=method, path=route, status=status, ms=took_ms, **record.fields())
                if self._trace:
                    self._trace(scope, record, route, status)


class Gate:
    """Admits requests with a valid key (without keys: to this server's own host names) and reads their bodies.

    Requests are counted against the key's limits here, so that each one counts, whatever its result.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: KeyStore | None,
        lifecycle: Lifecycle,
        quotas: Quotas,
        limits: LimitSettings,
        http: HttpSettings,
    ) -> None:
        self._app = app
        self._keys = keys
        self._lifecycle = lifecycle
        self._quotas = quotas
        self._limits = limits
        self._http = http

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _PUBLIC_PATHS:
            await self._app(scope, receive, send)
            return
        with ExitStack() as stack:
            try:
                scope["state"]["key"] = key = self._authenticate(scope)
                scope["state"]["log"].key = key.name
                send = _with_redirect(scope, self._with_limits(key, send))
                caller.set(key.name)
                self._check_served(scope)
                if scope["method"] == "POST" and _is_api(scope):
                    stack.enter_context(self._quotas.request(key))
                body = await self._body(scope, receive)
                self._check_served(scope)
            except ApiError as error:
                await error_response(error, scope)(scope, receive, send)
                return
            stack.enter_context(self._lifecycle.tracked())
            await self._app(scope, _replaying(body, receive), send)

    def _authenticate(self, scope: Scope) -> Key:
        headers, path = Headers(scope=scope), scope["path"]
        ours = self._is_ours(headers.get("host"))
        # scope["client"] is None if the connection was reset before it was read.
        local = ours and scope["client"] and is_loopback(scope["client"][0]) and "x-forwarded-for" not in headers
        if path in _LOCAL_PATHS and local:
            return ANONYMOUS
        if self._keys is None:
            # DNS rebinding: a web page can point its own host name to this machine and send requests from the browser.
            if not ours:
                message = f"host {shown(headers['host'])} is not a name of this server: set http.allowed_hosts, or keys"
                raise ApiError(403, message, code="host_not_allowed")
            if scope["method"] not in _SAFE_METHODS and not self._may_write(headers.get("origin")):
                message = f"origin {shown(headers['origin'])} is not allowed: set http.cors_origins, or keys"
                raise ApiError(403, message, code="origin_not_allowed")
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
            raise ApiError(403, f"key {key.name!r} is not an admin key", code="admin_required")
        return key

    def _with_limits(self, key: Key, send: Send) -> Send:
        """Wrap `send` to add headers with what is left of the key's limits."""
        if key.requests_per_minute is None and key.tokens_per_minute is None:
            return send

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._quotas.headers(key))
            await send(message)

        return send_with_limits

    def _is_ours(self, host: str | None) -> bool:
        if host is None:  # not from a browser, which always sends it
            return True
        name = _host_of(f"//{host}")
        return is_loopback(name) or name in self._http.allowed_hosts

    def _may_write(self, origin: str | None) -> bool:
        allowed = self._http.cors_origins
        return origin is None or "*" in allowed or origin in allowed or self._is_ours(_host_of(origin))

    def _check_served(self, scope: Scope) -> None:
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdecimal() and int(length) > self._limits.max_body_bytes:
            raise self._too_large()
        if _is_api(scope) and scope["path"] not in _PATHS_WITHOUT_MODEL and (refusal := self._lifecycle.refusal()):
            raise refusal

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """Read the whole body. Raises ApiError if it is too large, stalls, or the server shuts down meanwhile."""
        parts: list[bytes] = []
        size, more = 0, True
        started = last_received = time.monotonic()
        while more:
            try:
                async with asyncio.timeout(_BODY_POLL_S):
                    message = await receive()
            except TimeoutError:
                now = time.monotonic()
                silent, late = now - last_received, now - started
                if silent > self._limits.idle_client_timeout_s or late > self._limits.request_timeout_s:
                    text = f"the body stopped after {size} bytes, {silent:.0f} s ago"
                    raise ApiError(408, text, code="body_timeout", headers={"Connection": "close"}) from None
                self._check_served(scope)
                continue
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            parts.append(part := message.get("body", b""))
            size, more, last_received = size + len(part), message.get("more_body", False), time.monotonic()
            if size > self._limits.max_body_bytes:
                raise self._too_large()
        return b"".join(parts)

    def _too_large(self) -> ApiError:
        message = f"the body is larger than {self._limits.max_body_bytes} bytes"
        return ApiError(413, message, code="body_too_large")


def _with_redirect(scope: Scope, send: Send) -> Send:
    """Wrap `send` to make nginx try the next server (X-Accel-Redirect) if this one's part of a limit is used up."""
    next_server = Headers(scope=scope).get("x-llamaherd-elsewhere", "")

    async def send_or_redirect(message: Message) -> None:
        if message["type"] == "http.response.start" and SHARE_HEADER in (headers := MutableHeaders(scope=message)):
            del headers[SHARE_HEADER]
            if _ELSEWHERE.fullmatch(next_server):
                headers["X-Accel-Redirect"] = next_server
        await send(message)

    return send_or_redirect


def _is_api(scope: Scope) -> bool:
    return scope["path"] not in _LOCAL_PATHS and not scope["path"].startswith("/admin")


def _replaying(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that replays a body that has already been read."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _host_of(url: str) -> str:
    """Return the host name or address in a URL, or "" if it has none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _token(headers: Headers) -> str | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key", "").strip() or None


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _milliseconds(seconds: float) -> float | None:
    return None if math.isnan(seconds) else round(seconds * 1000, 1)
