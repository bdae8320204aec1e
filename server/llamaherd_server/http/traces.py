"""Traces of requests, sent to a collector by OTLP over HTTP. Imported only if an endpoint is set.

Each request has one span, created when the request ends from the times in its usage. A tracer's span is filled in under
locks and takes ten times as long, and spans for the phases would be three more. Attributes follow the semantic
conventions 1.45.0 for HTTP servers (https://opentelemetry.io/docs/specs/semconv/http/http-spans/) and 0.1.0 for GenAI
(https://github.com/open-telemetry/semantic-conventions-genai). Spans never contain prompts, answers or keys, only the
key's name.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import structlog
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision, ParentBased, TraceIdRatioBased
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import CollectorRegistry, Counter
from starlette.datastructures import Headers
from starlette.types import Scope

from llamaherd_server.config.settings import Settings, SettingsError
from llamaherd_server.http.middleware import RequestLog
from llamaherd_server.serving.meter import Usage

log = structlog.get_logger()

# Maximum number of spans waiting for the collector; further ones are dropped.
QUEUE = 2048
_PHASES = ("llamaherd.queue_s", "llamaherd.prefill_s", "llamaherd.decode_s")
_SCOPE = InstrumentationScope("llamaherd")
_REPORT_INTERVAL_S = 60.0
# How long a shutdown waits for remaining spans to be sent.
_FLUSH_S = 3.0
_OPERATIONS = {
    **dict.fromkeys(("/v1/chat/completions", "/chat/completions", "/v1/messages", "/v1/responses"), "chat"),
    **dict.fromkeys(("/v1/completions", "/completions", "/completion", "/infill"), "text_completion"),
    **dict.fromkeys(("/v1/embeddings", "/embeddings", "/embedding"), "embeddings"),
    **dict.fromkeys(("/v1/rerank", "/rerank", "/v1/reranking", "/reranking"), "rerank"),
}


class Traces:
    """Creates the spans of completed requests. A thread sends them."""

    def __init__(self, settings: Settings, registry: CollectorRegistry) -> None:
        """Count dropped spans in `registry`. Raises SettingsError for an invalid headers file."""
        telemetry, host, port = settings.telemetry, socket.gethostname(), settings.http.port
        url = f"{telemetry.otlp_endpoint}/v1/traces"
        headers = _headers(telemetry.otlp_headers_file) if telemetry.otlp_headers_file else {}
        self._exporter = _Exporter(OTLPSpanExporter(url, headers=headers), url, registry)
        self._processor = BatchSpanProcessor(self._exporter, max_queue_size=QUEUE)
        self._sampler = ParentBased(TraceIdRatioBased(telemetry.otlp_ratio))
        self._ids = RandomIdGenerator()
        self._resource = Resource.create(
            {
                "service.name": "llamaherd",
                "service.version": _version(),
                "service.instance.id": f"{host}:{port}",
                "host.name": host,
                "server.address": host,
                "server.port": port,
            }
        )
        self._propagator = TraceContextTextMapPropagator()
        self._created = 0

    def record(self, scope: Scope, request: RequestLog, route: str, status: int) -> None:
        """Create the span of a completed request. For a request that is not sampled, this takes microseconds."""
        ended = time.perf_counter()
        context = self._parent(scope)
        parent = get_current_span(context).get_span_context()
        trace_id = parent.trace_id if parent.is_valid else self._ids.generate_trace_id()
        sampled = self._sampler.should_sample(context, trace_id, "")
        if sampled.decision is not Decision.RECORD_AND_SAMPLE:
            return
        if self._created - self._exporter.taken >= QUEUE:
            self._exporter.drop(1, "more spans than the collector takes")
            return
        operation, error = _OPERATIONS.get(route), _error(request, status)
        attributes = dict(_attributes(scope, request, route, status, ended - request.arrived))
        failed = StatusCode.UNSET
        if error:
            attributes["error.type"] = error
            if status >= 500 or (status < 400 and error != "cancelled"):
                failed = StatusCode.ERROR
        model = request.models[1] if request.models else ""
        name = f"{operation} {model}".rstrip() if operation else f"{scope['method']} {route}"
        flags = TraceFlags(TraceFlags.SAMPLED)
        own = SpanContext(trace_id, self._ids.generate_span_id(), False, flags, sampled.trace_state)
        now, took = time.time_ns(), int((ended - request.arrived) * 1e9)
        span = ReadableSpan(
            name,
            own,
            parent if parent.is_valid else None,
            self._resource,
            attributes,
            kind=SpanKind.SERVER,
            instrumentation_scope=_SCOPE,
            status=Status(failed),
            start_time=now - took,
            end_time=now,
        )
        self._processor.on_end(span)
        self._created += 1

    async def close(self) -> None:
        """Send the remaining spans, for at most _FLUSH_S."""
        # A daemon thread, so that a hanging collector does not block the exit.
        closing = threading.Thread(target=self._processor.shutdown, daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, _FLUSH_S)
        if left := self._created - self._exporter.taken:
            self._exporter.drop(left, "the server stopped before they could be sent")
        self._exporter.report()

    def _parent(self, scope: Scope) -> Context:
        headers = Headers(scope=scope)
        given = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        return self._propagator.extract(given, Context()) if given else Context()


class _Exporter(SpanExporter):
    """Wraps `to` to count the spans that were not sent, and to log them at most every _REPORT_INTERVAL_S."""

    def __init__(self, to: SpanExporter, url: str, registry: CollectorRegistry) -> None:
        self.taken = 0
        self._to = to
        self._url = url
        self._dropped = Counter("llamaherd_dropped_spans", "Spans that the collector did not get", registry=registry)
        self._unreported = 0
        self._reported_at = -math.inf
        self._reason = ""
        self._lock = threading.Lock()
        self._first_line = _FirstLogLine()
        logger = logging.getLogger(OTLPSpanExporter.__module__)
        logger.handlers, logger.propagate = [self._first_line], False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.taken += len(spans)
        self._first_line.first = ""
        result = self._to.export(spans)
        if result is not SpanExportResult.SUCCESS:
            self.drop(len(spans), self._first_line.first)
        return result

    def shutdown(self) -> None:
        self._to.shutdown()

    def drop(self, count: int, reason: str) -> None:
        self._dropped.inc(count)
        with self._lock:
            self._unreported += count
            self._reason = reason
        if time.monotonic() - self._reported_at >= _REPORT_INTERVAL_S:
            self.report()

    def report(self) -> None:
        """Log how many spans were dropped since the last call."""
        with self._lock:
            count, self._unreported, self._reported_at = self._unreported, 0, time.monotonic()
        if count:
            log.warning("spans dropped", spans=count, collector=self._url, reason=self._reason)


class _FirstLogLine(logging.Handler):
    """Keeps the first line that the exporter logs about a failure, which names the cause; later lines are dropped."""

    first = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.first = self.first or record.getMessage()


def _phases(usage: Usage, ended_s: float) -> Iterator[tuple[str, float]]:
    """Yield the name and duration in seconds of each phase that the request reached."""
    last = ended_s if math.isnan(usage.ended_s) else usage.ended_s
    first = last - usage.decode_s if math.isnan(usage.ttft_s) else usage.ttft_s
    begins = [usage.entered_s, usage.entered_s + usage.queued_s, first]
    begins = [begin for begin in begins if not math.isnan(begin)]
    for name, (begin, end) in zip(_PHASES, pairwise([*begins, last]), strict=False):
        yield name, max(0.0, end - begin)


def _attributes(
    scope: Scope, request: RequestLog, route: str, status: int, ended_s: float
) -> Iterator[tuple[str, str | float | bool | list[str]]]:
    yield "http.request.method", scope["method"]
    if route != "other":
        yield "http.route", route
    yield "http.response.status_code", status
    yield "llamaherd.request_id", request.request_id
    if request.key is not None:
        yield "llamaherd.key", request.key
    if not (operation := _OPERATIONS.get(route)):
        return
    yield "gen_ai.operation.name", operation
    yield "gen_ai.provider.name", "llamaherd"
    if request.models:
        yield "gen_ai.request.model", request.models[0][:256]
        yield "gen_ai.response.model", request.models[1]
    if request.streamed:
        yield "gen_ai.request.stream", True
    if usage := request.usage:
        yield from _phases(usage, ended_s)
        yield "gen_ai.usage.input_tokens", usage.prompt_tokens
        if usage.cached_tokens:
            yield "gen_ai.usage.cache_read.input_tokens", usage.cached_tokens
        yield "gen_ai.usage.output_tokens", usage.completion_tokens
        if usage.outcomes:
            reasons = [outcome if outcome in ("stop", "length") else "error" for outcome in usage.outcomes]
            yield "gen_ai.response.finish_reasons", reasons


def _error(request: RequestLog, status: int) -> str | None:
    """Return why the request failed: an error's code, `cancelled`, or the status; None: it succeeded."""
    if request.client_gone:
        return "cancelled"
    failed = [one for one in (request.usage.outcomes if request.usage else []) if one not in ("stop", "length")]
    failed.sort(key=lambda one: one == "cancelled")  # the cause first: one failure cancels the other generations
    if request.error or failed:
        return request.error or failed[0]
    return str(status) if status >= 400 else None


def _headers(path: Path) -> dict[str, str]:
    """Read the headers file. Raises SettingsError, never with a header's value, because those are secrets."""
    found: dict[str, str] = {}
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"telemetry.otlp_headers_file: {path} cannot be read as text: {error}") from None
    for number, line in enumerate(lines, 1):
        name, colon, value = line.partition(":")
        if not line.strip() or line.startswith("#"):
            continue
        if not (colon and name.strip() and value.strip() and line.isascii() and " " not in name.strip()):
            message = f"line {number} of {path} must be a header such as Authorization: Bearer TOKEN"
            raise SettingsError(f"telemetry.otlp_headers_file: {message}")
        found[name.strip()] = value.strip()
    return found


def _version() -> str:
    with suppress(metadata.PackageNotFoundError):  # the container image has no package metadata
        return metadata.version("llamaherd-server")
    return "unknown"
