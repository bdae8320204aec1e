"""HTTP as clients and proxies speak it: methods, paths, versions, connections that end early, silent streams."""

from __future__ import annotations

import asyncio
import socket
import struct
import subprocess
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from llamaherd_server.api import answer
from llamaherd_server.http import protocol as http_protocol
from tests.server.conftest import Server, paced, running

from .conftest import Serve
from .double import Double

STREAM = {"prompt": "x", "stream": True}


@pytest.fixture(scope="module")
def paced_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("http"), paced(step_ms=20, tokens=100)) as started:
        yield started


@pytest.mark.parametrize("path", ["/", "/v1/models", "/livez", "/readyz", "/health", "/metrics", "/props", "/docs"])
def test_head_is_get_without_a_body(paced_server: Server, path: str) -> None:
    got = httpx.get(f"{paced_server.url}{path}")
    head = httpx.head(f"{paced_server.url}{path}")
    assert (head.status_code, head.headers["Content-Type"]) == (200, got.headers["Content-Type"])
    assert head.content == b""
    assert int(head.headers["Content-Length"]) > 0


async def test_a_slash_at_the_end_changes_nothing(serve: Serve) -> None:
    async with serve(Double()) as served:
        for path in ("/v1/chat/completions/", "/v1/chat/completions//"):
            reply = await served.http.post(path, json={"messages": [{"role": "user", "content": "x"}]})
            assert reply.status_code == 200
        assert (await served.http.get("/v1/models/")).json()["object"] == "list"


def raw(server: Server, request: bytes) -> bytes:
    """All that the server sends until it closes the connection."""
    with connected(server) as client:
        client.sendall(request)
        return b"".join(iter(lambda: client.recv(65536), b""))


def connected(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", httpx.URL(server.url).port or 0), timeout=30)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/nowhere"])
def test_an_answer_to_http_1_0_has_no_chunks(paced_server: Server, path: str) -> None:
    body = b'{"prompt": "x", "stream": true, "max_tokens": 3}'
    head = b"POST %b HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (
        path.encode(),
        len(body),
    )
    head, _, content = raw(paced_server, head + body).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert content.startswith((b"data: {", b'{"error"'))


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def test_connections_that_are_reset_are_no_failures(paced_server: Server) -> None:
    body = b'{"prompt": "x", "max_tokens": 50}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    before = statuses(paced_server)  # it was loading
    whole = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    for request in (
        b"",
        b"GET /",
        head,
        head + b"Content-Length: 99\r\n\r\n{",
        whole,
        b"GET /metrics HTTP/1.1\r\n\r\n",
    ):
        for _ in range(50):
            client = connected(paced_server)
            client.sendall(request)
            reset(client)
    assert httpx.post(f"{paced_server.url}/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
    seen = statuses(paced_server) - before
    assert "499" in seen
    assert not [status for status in seen if status.startswith("5")]
    assert "Traceback" not in paced_server.log.read_text()


def statuses(server: Server) -> set[str]:
    """Of all responses so far."""
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
    [responses] = [family for family in families if family.name == "llamaherd_http_responses"]
    return {sample.labels["status"] for sample in responses.samples}


async def test_a_silent_stream_is_kept_alive_in_the_queue_too(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "KEEP_ALIVE_S", 0.05)
    double = Double(tokens=2, pace_s=0.3)
    double.settings = double.settings.__class__(parallel=1)
    async with serve(double) as served:
        answers = await asyncio.gather(*(served.http.post("/v1/completions", json=STREAM) for _ in range(4)))
    assert {reply.status_code for reply in answers} == {200}
    texts = [reply.text for reply in answers]
    for got in texts:
        assert ": keep-alive\n\n" in got
        assert got.endswith("data: [DONE]\n\n")
    assert max(got.index("data: ") for got in texts) > 4 * len(": keep-alive\n\n")


async def test_an_error_after_a_long_wait_is_an_event(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "KEEP_ALIVE_S", 0.05)
    async with serve(Double(tokens=9, pace_s=9), first_token_timeout_s=0.3) as served:
        reply = await served.http.post("/v1/completions", json=STREAM)
    assert reply.status_code == 200
    assert "first_token_timeout" in reply.text


async def test_a_body_that_stops_coming_is_given_up(serve: Serve) -> None:
    async with serve(Double(), idle_client_timeout_s=1) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.http.base_url.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
        answer_bytes = await reader.read()
        writer.close()
    assert answer_bytes.startswith(b"HTTP/1.1 408")
    assert b"the body stopped after 1 bytes" in answer_bytes


@pytest.mark.parametrize("head", [b"GET", b"GET / HTTP/1.1\r\nHost: loc", b"GET /livez HTTP/1.1\r\n\r\nGET / HT"])
async def test_a_head_that_stops_coming_is_given_up(serve: Serve, monkeypatch: pytest.MonkeyPatch, head: bytes) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_S", 0.2)
    async with serve(Double()) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.http.base_url.port)
        writer.write(head)
        assert (await reader.read()).count(b"HTTP/1.1 200") == head.count(b"livez")
        writer.close()


def test_half_sent_requests_do_not_delay_the_exit(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running(tmp_path_factory.mktemp("drain"), paced(step_ms=1, tokens=1)) as server:
        clients = [connected(server) for _ in range(100)]
        for number, client in enumerate(clients):
            half = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
            client.sendall(half[: len(half) - number % 60])
        assert httpx.get(f"{server.url}/readyz").status_code == 200
        try:
            assert server.terminate() == 0
        except subprocess.TimeoutExpired:
            pytest.fail(server.log.read_text())
        log = server.log.read_text()
        for client in clients:
            client.close()
    assert "Traceback" not in log
    assert "drain deadline reached" not in log
