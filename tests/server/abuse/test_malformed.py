"""10,000 requests that nobody should send: every one is answered, none breaks the server or fills its memory."""

from __future__ import annotations

import http.client
import json
import random
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from bench.servers import Running

from ..conftest import Server, paced, running

REQUESTS = 10_000
# What caches and the allocator may still take after the first 2,000.
GROWTH_MIB = 16
SOUND: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 1,
        "temperature": 0.5,
        "stop": ["y"],
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
        "logit_bias": {"1": 2},
        "stream": True,
    },
    "/v1/completions": {"prompt": "x", "max_tokens": 1, "n": 2, "seed": 3, "logprobs": 1, "grammar": 'root ::= "a"'},
    "/tokenize": {"content": "x", "add_special": True},
    "/detokenize": {"tokens": [1, 2]},
    "/admin/engine": {"parallel": 2},
}
STRANGE: list[Any] = [
    *(None, True, "", "x", "\0", "\ud800", "é" * 999, -1, 2**31, 2**63, 2**64, -(2**70), 10**400, 1e308, 0.5),
    *([], {}, [[]], [None], {"": ""}, {"\0": "\0"}, {"type": "image_url"}, ["x"] * 999, {"$ref": "#"}),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"parallel": 8, "ctx_per_slot": 64, "batch": 64, "ubatch": 64}
    with running(tmp_path_factory.mktemp("abuse"), paced(step_ms=1, tokens=1), engine=settings) as started:
        yield started


def strange(generator: random.Random, body: dict[str, Any]) -> bytes:
    """The body with one of its values, at any depth, replaced, or with a field that does not exist."""
    body = json.loads(json.dumps(body))
    place: Any = body
    while True:
        at = generator.choice([*place] if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[at], dict | list) or not place[at] or generator.random() < 0.4:
            break
        place = place[at]
    place[at] = generator.choice(STRANGE)
    if generator.random() < 0.2:
        body[generator.choice(["temperatur", "\0", "__proto__", "", "é"])] = generator.choice(STRANGE)
    return json.dumps(body).encode()


def damaged(generator: random.Random, body: dict[str, Any]) -> bytes:
    """The body cut off, with bytes or tokens put into it that JSON has not, or nested without end."""
    text = json.dumps(body).encode()
    at = generator.randrange(len(text))
    deep = generator.choice([500, 50_000])
    nested = generator.choice([b"[" * deep, b'{"a":' * deep, b"[" * deep + b"]" * deep])
    into = generator.choice([b"\0", b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"NaN", b"-Infinity", b"1e999", b"9" * 5000])
    field = json.dumps(generator.choice([*body])).encode()
    return generator.choice(
        [
            text[:at],
            text[:at] + into + text[at:],
            nested,
            text[:-1] + b", " + field + b": " + generator.choice([nested, into, b'"\\u0000"', b'"\\ud800"']) + b"}",
            generator.randbytes(at),
            b"",
        ]
    )


def rss_mib(server: Server) -> float:
    return Running(0, server.process.pid).rss_mib


def test_malformed_requests_leave_the_server_as_it_was(server: Server) -> None:
    generator = random.Random(7)
    address = httpx.URL(server.url)
    connection = http.client.HTTPConnection(address.host, address.port, timeout=60)
    statuses: Counter[int] = Counter()
    settled = 0.0
    for number in range(REQUESTS):
        path = generator.choice([*SOUND])
        body = generator.choice([strange, damaged])(generator, SOUND[path])
        kind = generator.choice(["application/json"] * 8 + ["text/plain", "application/json; charset=utf-16"])
        connection.request("PUT" if path.startswith("/admin") else "POST", path, body, {"Content-Type": kind})
        reply = connection.getresponse()
        content = reply.read()
        statuses[reply.status] += 1
        assert reply.status < 500, (path, body[:200], content)
        assert reply.status == 200 or json.loads(content)["error"]["message"], (path, body[:200])
        if number == REQUESTS // 5:
            settled = rss_mib(server)
    assert statuses[400] > REQUESTS / 2, statuses
    assert statuses[422] == 0
    assert rss_mib(server) < settled + GROWTH_MIB
    sound = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 1})
    assert sound.status_code == 200
    assert httpx.get(f"{server.url}/admin/engine").json()["restarts"] == 0


HEADS = [
    b"GET / HTTP/9.9\r\n\r\n",
    b"\x16\x03\x01\x02\0",
    b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
    b"GET /v1/models HTTP/1.1\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nAuthorization: Bearer \xff\xfe\r\nX-Request-Id: \xff\r\nHost: x\r\n\r\n",
    b"GET /%00/%ff HTTP/1.1\r\nHost: x\r\n\r\n",
]


@pytest.mark.parametrize("head", HEADS, ids=range(len(HEADS)))
def test_malformed_http_is_refused_and_not_logged_as_a_failure(server: Server, head: bytes) -> None:
    with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port or 0), timeout=10) as client:
        client.sendall(head)
        client.shutdown(socket.SHUT_WR)
        answer = client.recv(65536)
    assert answer == b"" or 400 <= int(answer.split(b" ", 2)[1]) < 500 or b" 200 " in answer[:15]
    assert httpx.get(f"{server.url}/readyz").status_code == 200
    assert "Traceback" not in server.log.read_text()
