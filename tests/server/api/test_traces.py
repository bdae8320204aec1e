"""What a collector gets of requests, and what requests notice of a collector: nothing."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from prometheus_client import CollectorRegistry

from llamaherd_server.app import create_app
from llamaherd_server.config.settings import Settings, SettingsError
from llamaherd_server.engine.base import Event
from llamaherd_server.http import traces
from llamaherd_server.http.middleware import RequestLog
from llamaherd_server.wire.errors import EngineError
from llamaherd_server.wire.protocol import Delta, Generate, Started

from ..collector import Collector, collecting, values
from ..conftest import free_port, paced, running
from .conftest import Serve, until
from .double import Double

SECRET = "sesame-open"
KEYS = f'[[keys]]\nname = "app"\nsha256 = "{sha256(SECRET.encode()).hexdigest()}"\n'
BY_KEY = {"Authorization": f"Bearer {SECRET}"}
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-{}"
HERE = "http://127.0.0.1:4318"
PHASES = ["llamaherd.queue_s", "llamaherd.prefill_s", "llamaherd.decode_s"]


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as started:
        yield started


def to(collector: Collector, **more: Any) -> dict[str, Any]:
    """The table [telemetry]."""
    return {"otlp_endpoint": collector.url, **more}


def seconds(span: Span) -> float:
    return (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9


def phases(span: Span) -> list[str]:
    """Those that the request came to."""
    return [name for name in values(span.attributes) if name in PHASES]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_is_a_span_with_its_phases_and_no_text(serve: Serve, collector: Collector, stream: bool) -> None:
    began = time.time()
    async with serve(Double(tokens=4, pace_s=0.02), keys=KEYS, telemetry=to(collector)) as served:
        body = {"model": "double", "messages": [{"role": "user", "content": "a private matter"}], "stream": stream}
        headers = {**BY_KEY, "X-Request-Id": "edge-1"}
        reply = await served.http.post("/v1/chat/completions", json=body, headers=headers)
        assert "w3" in reply.text
    request = collector.span()
    assert (request.name, request.status.code, request.parent_span_id) == ("chat double", Status.STATUS_CODE_UNSET, b"")
    assert request.kind == Span.SPAN_KIND_SERVER
    found = values(request.attributes)
    took = [found.pop(phase) for phase in PHASES]
    assert 0.02 <= took[1] < took[2] < 1  # one token and three
    assert took[0] >= 0
    assert sum(took) <= seconds(request)
    assert found == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "llamaherd",
        "gen_ai.request.model": "double",
        "gen_ai.response.model": "double",
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 2,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.response.finish_reasons": ["stop"],
        "llamaherd.request_id": "edge-1",
        "llamaherd.key": "app",
    } | ({"gen_ai.request.stream": True} if stream else {})
    assert began <= request.start_time_unix_nano / 1e9 < time.time()
    resource = {name: collector.resource[name] for name in ("service.name", "server.address", "server.port")}
    assert list(resource.values()) == ["llamaherd", socket.gethostname(), 8080]
    sent = b"".join(body for _, _, body in collector.requests)
    assert not [text for text in (b"private", b"w3", SECRET.encode()) if text in sent]


async def test_a_trace_goes_on_where_its_flags_say_so(serve: Serve, collector: Collector) -> None:
    async with serve(Double(), telemetry=to(collector, otlp_ratio=0)) as served:
        body = {"prompt": "x"}
        for flags in ("00", "01"):
            headers = {"traceparent": PARENT.format(flags)}
            assert (await served.http.post("/v1/completions", json=body, headers=headers)).status_code == 200
        await served.http.post("/v1/completions", json=body)
        await served.http.post("/v1/completions", json=body, headers={"traceparent": "nonsense"})
    request = collector.span()  # a ratio of 0, so that the others have none
    assert request.trace_id.hex() == "0af7651916cd43dd8448eb211c80319c"
    assert request.parent_span_id.hex() == "b7ad6b7169203331"
    assert (request.name, phases(request)) == ("text_completion double", PHASES)


async def crashing(request: Generate) -> AsyncGenerator[Event, None]:
    yield Started(request.id, 5, 0)
    yield Delta(id=request.id, text="w", n_tokens=1)
    raise EngineError("engine_crashed", "the engine ended")


async def too_long(request: Generate) -> AsyncGenerator[Event, None]:
    raise EngineError("context_length_exceeded", "the prompt is too long", "prompt")
    yield Started(request.id, 5, 0)


@pytest.mark.parametrize(
    ("script", "fields", "name", "error", "status", "reasons", "came_to"),
    [
        (crashing, {"stream": True}, "chat double", "engine_crashed", Status.STATUS_CODE_ERROR, ["error"], PHASES),
        (crashing, {"n": 2}, "chat double", "engine_crashed", Status.STATUS_CODE_ERROR, ["error"] * 2, PHASES),
        (too_long, {}, "chat double", "context_length_exceeded", Status.STATUS_CODE_UNSET, ["error"], PHASES[:2]),
        (None, {"model": "other"}, "chat", "model_not_found", Status.STATUS_CODE_UNSET, None, []),
        (None, {"temperature": "hot"}, "chat double", "invalid_value", Status.STATUS_CODE_UNSET, None, []),
    ],
)
async def test_an_error_is_named(
    serve: Serve,
    collector: Collector,
    script: Any,
    fields: dict[str, Any],
    name: str,
    error: str,
    status: int,
    reasons: list[str] | None,
    came_to: list[str],
) -> None:
    async with serve(Double(script=script), telemetry=to(collector)) as served:
        await served.chat(**{"model": "double", **fields})
    request = collector.span()
    found = values(request.attributes)
    assert (request.name, found["error.type"], request.status.code) == (name, error, status)
    assert found.get("gen_ai.response.finish_reasons") == reasons
    assert phases(request) == came_to


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_is_an_end_and_no_error(serve: Serve, collector: Collector, stream: bool) -> None:
    double = Double(tokens=10_000, pace_s=0.01)
    async with serve(double, telemetry=to(collector)) as served:
        running = asyncio.create_task(served.chat(stream=stream))
        await until(lambda: double.running == 1)
        await asyncio.sleep(0.1)
        running.cancel()
        await until(lambda: double.running == 0)
    request = collector.span()
    found = values(request.attributes)
    assert (found["error.type"], request.status.code) == ("cancelled", Status.STATUS_CODE_UNSET)
    assert found["gen_ai.response.finish_reasons"] == ["error"]
    assert phases(request) == PHASES


async def test_what_computes_nothing_has_no_phases_and_probes_no_span(serve: Serve, collector: Collector) -> None:
    async with serve(Double(), keys=KEYS, telemetry=to(collector)) as served:
        for path in ("/health", "/metrics", "/v1/models", "/made/up"):
            await served.http.get(path, headers=BY_KEY)
        await served.http.get("/v1/models")
        await served.http.post("/v1/embeddings", json={"input": "x"}, headers=BY_KEY)
    assert [(span.name, values(span.attributes).get("error.type")) for span in collector.spans] == [
        ("GET /v1/models", None),
        ("GET other", "404"),
        ("GET other", "invalid_api_key"),
        ("embeddings double", None),
    ]


async def test_the_collectors_headers_come_from_a_file(serve: Serve, collector: Collector, tmp_path: Path) -> None:
    headers = tmp_path / "otlp-headers"
    headers.write_text("# of the vendor\nAuthorization: Basic aGVyZDo=\n\nX-Scope-OrgID: herd\n")
    async with serve(Double(), telemetry=to(collector, otlp_headers_file=headers)) as served:
        await served.chat()
    [(path, sent, _)] = collector.requests
    assert (path, sent["authorization"], sent["x-scope-orgid"]) == ("/v1/traces", "Basic aGVyZDo=", "herd")


def settings(folder: Path, **telemetry: Any) -> Settings:
    (folder / "model.gguf").write_bytes(b"GGUF")
    table = {"model": {"name": "double", "path": folder / "model.gguf"}, "telemetry": telemetry}
    return Settings.model_validate(table)


@pytest.mark.parametrize(
    "text", ["Authorization Bearer sesame", "Authorization:", ": sesame", "Au tho: sesame", "É: ü"]
)
def test_a_header_that_cannot_be_sent_is_refused_without_its_value(tmp_path: Path, text: str) -> None:
    headers = tmp_path / "otlp-headers"
    headers.write_text(f"X-One: 1\n{text}\n")
    with pytest.raises(SettingsError, match=r"otlp_headers_file: line 2 of .* such as Authorization") as refused:
        create_app(settings(tmp_path, otlp_endpoint=HERE, otlp_headers_file=headers), lambda _: Double())
    assert "sesame" not in str(refused.value)


def test_without_the_packages_the_setting_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "llamaherd_server.http.traces", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(SettingsError, match=r"otlp_endpoint needs opentelemetry.*llamaherd-server\[telemetry\]"):
        create_app(settings(tmp_path, otlp_endpoint=HERE), lambda _: Double())


def test_without_an_endpoint_none_of_it_is_imported() -> None:
    """FastAPI imports OpenTelemetry's API by itself; the SDK, requests and protobuf are what takes memory."""
    show = "import sys, llamaherd_server.__main__; print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", show], check=True, capture_output=True, text=True)
    loaded = done.stdout.split()
    assert "llamaherd_server.http.middleware" in loaded
    heavy = (
        "opentelemetry.sdk",
        "opentelemetry.exporter",
        "google.protobuf",
        "requests",
        "llamaherd_server.http.traces",
    )
    assert [name for name in loaded if name.startswith(heavy)] == []


def dropped(page: str) -> float:
    return float(page.split("\nllamaherd_dropped_spans_total ")[1].split(maxsplit=1)[0])


@pytest.mark.parametrize("hangs", [False, True], ids=["nobody listens", "nobody answers"])
def test_a_collector_that_is_down_costs_requests_nothing(tmp_path: Path, hangs: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1] if hangs else free_port()
        telemetry = {"otlp_endpoint": f"http://127.0.0.1:{port}"}
        environment = paced(step_ms=1) | {"OTEL_BSP_SCHEDULE_DELAY": "50", "OTEL_EXPORTER_OTLP_TIMEOUT": "2"}
        with running(tmp_path, environment, telemetry=telemetry) as server, httpx.Client(base_url=server.url) as http:
            began, took = time.monotonic(), list[float]()
            while time.monotonic() < began + 3:
                sent = time.monotonic()
                assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200
                took.append(time.monotonic() - sent)
                time.sleep(0.02)
            assert sorted(took)[len(took) * 9 // 10] < 0.5
            assert dropped(http.get("/metrics").text) >= 1
            stopping = time.monotonic()
            assert server.terminate() == 0
            assert time.monotonic() - stopping < 8
            lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    warnings = [line for line in lines if line["event"] == "spans dropped"]
    assert len(warnings) == 2, "one at the first, one at the end"
    assert sum(line["spans"] for line in warnings) == len(took)
    assert ("due to timeout" if hangs else "Connection refused") in warnings[0]["reason"]
    assert [line for line in lines if line["level"] not in ("info", "warning")] == []


async def test_spans_beyond_the_queue_are_dropped_and_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(traces, "QUEUE", 512)
    monkeypatch.setattr(traces, "_FLUSH_S", 0.2)
    registry = CollectorRegistry()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        to = traces.Traces(settings(tmp_path, otlp_endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}"), registry)
        record = partial(to.record, {"method": "GET", "headers": []}, RequestLog("x"), "/v1/models", 200)
        for _ in range(512):
            record()
        await until(lambda: to._exporter.taken == 512)  # they are being sent, and as many may wait
        for _ in range(600):
            record()
        assert registry.get_sample_value("llamaherd_dropped_spans_total") == 600 - 512
        await to.close()
    assert registry.get_sample_value("llamaherd_dropped_spans_total") == 600
    printed = capsys.readouterr().out
    assert printed.count("spans dropped") == 2
    assert "more spans than the collector takes" in printed
