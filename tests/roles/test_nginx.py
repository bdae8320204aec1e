"""nginx as the role configures it, an edge before a host with an nginx of its own, both in one on loopback.

Behind it the real server paces its tokens by the clock. Each test has an address and a key of its own, as limits count.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.roles import nginx
from tests.server.conftest import free_port, paced
from tests.server.conftest import running as server_running

pytestmark = pytest.mark.needs("nginx", "openssl")

STREAMS, BURST = 3, 8
ASK = {"prompt": "Count.", "max_tokens": 20, "stream": True}


@dataclass(frozen=True)
class Edge:
    port: int
    inner: int
    server: str
    folder: Path  # of nginx.conf

    def client(self, address: str, key: str = "key") -> httpx.Client:
        tls = ssl.create_default_context(cafile=self.folder / "llamaherd/ca.crt")
        transport = httpx.HTTPTransport(verify=tls, local_address=address)
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=f"https://127.0.0.1:{self.port}", transport=transport, headers=headers, timeout=60)

    def until_busy(self, slots: int) -> None:
        while httpx.get(f"{self.server}/admin/engine").json()["stats"]["slots_busy"] != slots:
            time.sleep(0.05)


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    folder = tmp_path_factory.mktemp("nginx")
    ports = {"llamaherd_nginx_port": free_port(), "llamaherd_nginx_inner_port": free_port()}
    limits = {
        "llamaherd_nginx_streams": STREAMS,
        "llamaherd_nginx_generate_rate": "1r/m",
        "llamaherd_nginx_generate_burst": BURST - 1,
        "llamaherd_nginx_max_body": "64k",
    }
    engine = {"parallel": 16, "ctx_per_slot": 4096}
    with server_running(folder, paced(step_ms=20), engine=engine) as server:
        behind = {"llamaherd_server_port": int(server.url.rpartition(":")[2]), "ansible_host": "127.0.0.1"}
        groups = {"inference": {"hosts": {nginx.HOST: None}}, "edge": {"hosts": {nginx.HOST: None, "another": None}}}
        made = nginx.certificates(folder)
        public = {"llamaherd_nginx_tls": "provided", "llamaherd_nginx_certificate": str(made / "public.crt")}
        public["llamaherd_nginx_certificate_key"] = str(made / "public.key")
        with responder(made):
            config = nginx.render(folder, {**ports, **limits, **behind, **public, "groups": groups})
            with nginx.running(config):
                yield Edge(
                    ports["llamaherd_nginx_port"], ports["llamaherd_nginx_inner_port"], server.url, config.parent
                )


@dataclass
class Failing:
    """In place of a server, for all hosts behind an edge: closes each connection after its request, or answers 503."""

    edge_port: int
    folder: Path
    reply: bytes = b""
    requests: int = 0

    def respond(self, connection: socket.socket) -> None:
        connection.recv(65536)
        self.requests += 1
        connection.sendall(self.reply)
        reset = struct.pack("ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset if not self.reply else bytes(8))

    def post(self) -> httpx.Response:
        tls = ssl.create_default_context(cafile=self.folder / "ca.crt")
        return httpx.post(f"https://127.0.0.1:{self.edge_port}/v1/completions", json=ASK, verify=tls, timeout=60)


@pytest.fixture
def failing(tmp_path: Path) -> Iterator[Failing]:
    """Two hosts behind the edge: one nginx, at two addresses."""
    ports = {"llamaherd_nginx_port": free_port(), "llamaherd_nginx_inner_port": free_port()}
    hosts = {nginx.HOST: {"ansible_host": "127.0.0.1"}, "another": {"ansible_host": "127.0.0.2"}}
    groups = {"inference": {"hosts": hosts}, "edge": {"hosts": {nginx.HOST: None}}}
    found = Failing(ports["llamaherd_nginx_port"], tmp_path / "nginx/llamaherd")
    with nginx.answering(found.respond) as port:
        config = nginx.render(tmp_path, {**ports, "llamaherd_server_port": port, "groups": groups})
        with nginx.running(config):
            yield found


@contextmanager
def responder(folder: Path) -> Iterator[None]:
    """Sign the public certificate, and tell by OCSP, until the block ends, that it is good."""
    port, serial = free_port(), "7A"
    names = f"-addext subjectAltName=IP:127.0.0.1 -addext authorityInfoAccess=OCSP;URI:http://127.0.0.1:{port}"
    sign = f"{nginx.SELF_SIGNED} -subj /CN=edge {names} -CA tls.crt -CAkey tls.key -set_serial 0x{serial}"
    subprocess.run(f"{sign} -keyout public.key -out public.crt".split(), cwd=folder, check=True, capture_output=True)
    with (folder / "public.crt").open("a") as chain:
        chain.write((folder / "tls.crt").read_text())
    (folder / "index").write_text(f"V\t991231235959Z\t\t{serial}\tunknown\t/CN=edge\n")
    answer = f"openssl ocsp -port {port} -index index -CA tls.crt -rsigner tls.crt -rkey tls.key"
    with subprocess.Popen(answer.split(), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.kill()


def refused(answers: list[httpx.Response]) -> int:
    """How many were beyond a limit; each says so as OpenAI does."""
    found = [answer for answer in answers if answer.status_code != 200]
    for answer in found:
        assert answer.status_code == 429
        assert int(answer.headers["Retry-After"]) >= 1
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.json()["error"]["type"] == "rate_limit_error"
    return len(found)


def test_http2_is_offered(edge: Edge) -> None:
    tls = ssl.create_default_context(cafile=edge.folder / "llamaherd/ca.crt")
    tls.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", edge.port)) as plain,
        tls.wrap_socket(plain, server_hostname="127.0.0.1") as found,
    ):
        assert found.selected_alpn_protocol() == "h2"


def test_ocsp_is_stapled(edge: Edge) -> None:
    ask = f"openssl s_client -connect 127.0.0.1:{edge.port} -status"
    while True:  # nginx asks the responder when it is first asked itself
        found = subprocess.run(ask.split(), input="", capture_output=True, text=True, check=True).stdout
        if "OCSP Response Status: successful" in found:
            break
        assert "OCSP response: no response sent" in found
    assert "Cert Status: good" in found


def test_each_token_comes_before_the_next_is_made(edge: Edge) -> None:
    """The double's tokens say when they were made, on the clock that is read here."""
    with edge.client("127.0.1.1") as client, client.stream("POST", "/v1/completions", json=ASK) as answer:
        seen = [(time.monotonic_ns(), line) for line in answer.iter_lines() if '"text":" ' in line]
    made = [int(re.findall(r'"text":" (\d+)"', line)[0]) for _, line in seen]
    assert len(made) == ASK["max_tokens"]
    assert seen[0][0] < made[-1]


def test_a_client_that_goes_away_cancels_what_was_computed_for_it(edge: Edge) -> None:
    with edge.client("127.0.1.2") as client:
        with client.stream("POST", "/v1/completions", json=ASK | {"max_tokens": 4000}) as answer:
            lines = answer.iter_lines()
            next(lines)
            edge.until_busy(1)
        edge.until_busy(0)


@pytest.mark.parametrize("of", ["address", "key"])
def test_requests_at_once_are_limited(edge: Edge, of: str) -> None:
    def ask(number: int) -> httpx.Response:
        address, key = ("127.0.1.3", str(number)) if of == "address" else (f"127.0.2.{number + 1}", "one at once")
        with edge.client(address, key) as client:
            return client.post("/v1/completions", json=ASK | {"stream": False, "max_tokens": 100})

    with ThreadPoolExecutor(2 * STREAMS) as pool:
        assert refused(list(pool.map(ask, range(2 * STREAMS)))) == STREAMS


@pytest.mark.parametrize("of", ["address", "key"])
def test_requests_a_minute_are_limited_apart_from_those_that_only_look(edge: Edge, of: str) -> None:
    answers = []
    for number in range(BURST + 2):
        address, key = ("127.0.1.4", str(number)) if of == "address" else (f"127.0.3.{number + 1}", "one")
        with edge.client(address, key) as client:
            answers.append(client.post("/v1/completions", json=ASK | {"stream": False, "max_tokens": 1}))
            assert client.get("/v1/models").status_code == 200
    assert refused(answers) == 2


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/completions", b"x" * 70_000, 413, "request_too_large"),
        ("/metrics", b"", 404, "not_found"),
        ("/admin/engine", b"", 404, "not_found"),
        ("/docs", b"", 404, "not_found"),
    ],
)
def test_what_nginx_refuses_it_refuses_as_openai_does(
    edge: Edge, path: str, body: bytes, status: int, code: str
) -> None:
    with edge.client("127.0.1.5", "refused") as client:
        answer = client.post(path, content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.headers["Server"] == "nginx"
    assert "max-age=" in answer.headers["Strict-Transport-Security"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["X-Frame-Options"] == "SAMEORIGIN"


def test_a_request_that_a_server_died_of_reaches_no_other_host(failing: Failing) -> None:
    answer = failing.post()
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "server_failed")
    assert failing.requests == 1


def test_a_request_that_a_host_refuses_goes_to_another_one(failing: Failing) -> None:
    failing.reply = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    assert failing.post().status_code == 503
    assert failing.requests == 2


def test_one_key_is_one_however_it_is_sent(edge: Edge) -> None:
    forms = [
        {"Authorization": "Bearer all forms"},
        {"Authorization": "bEARER all forms"},
        {"Authorization": "Bearer    all forms"},
        {"Authorization": "Bearer \t all forms"},
        {"Authorization": "Bearer \xa0all forms"},
        {"Authorization": "Bearer all forms", "X-Api-Key": "another"},
        {"X-Api-Key": "all forms"},
        {"Authorization": "Bearer", "X-Api-Key": "all forms"},
        {"Authorization": "Basic all forms", "X-Api-Key": "all forms"},
        {"Authorization": "Token all", "X-Api-Key": "all forms"},
    ]
    assert len(forms) == BURST + 2
    answers = []
    for number, headers in enumerate(forms):
        with edge.client(f"127.0.4.{number + 1}") as client:
            del client.headers["Authorization"]
            body = ASK | {"stream": False, "max_tokens": 1}
            sent = httpx.Headers(headers, encoding="latin-1")
            answers.append(client.post("/v1/completions", json=body, headers=sent))
    assert refused(answers) == 2


def raw(edge: Edge, request: bytes) -> tuple[bytes, bytes]:
    """Head and body of what comes back until the connection ends."""
    tls = ssl.create_default_context(cafile=edge.folder / "llamaherd/ca.crt")
    with (
        socket.create_connection(("127.0.0.1", edge.port), source_address=("127.0.1.6", 0)) as plain,
        tls.wrap_socket(plain, server_hostname="127.0.0.1") as found,
    ):
        found.sendall(request)
        head, _, body = b"".join(iter(lambda: found.recv(65536), b"")).partition(b"\r\n\r\n")
    return head, body


@pytest.mark.parametrize("line", ["GET * HTTP/1.1", "GET /v1/%00 HTTP/1.1", "GET /v1/../.. HTTP/1.1", "nonsense"])
def test_a_request_that_nginx_cannot_read_gets_json(edge: Edge, line: str) -> None:
    head, body = raw(edge, f"{line}\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
    if line != "nonsense":  # HTTP/0.9 has no head
        assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body or head)["error"]["code"] == "bad_request"


def test_http_1_0_streams_to_the_end(edge: Edge) -> None:
    ask = json.dumps(ASK).encode()
    head, body = raw(
        edge,
        b"POST /v1/completions HTTP/1.0\r\nHost: 127.0.0.1\r\nAuthorization: Bearer old\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(ask), ask),
    )
    assert b" 200 " in head
    assert b"transfer-encoding" not in head.lower()
    assert body.endswith(b"data: [DONE]\n\n")


def test_a_long_prompt_is_in_no_file(edge: Edge) -> None:
    with edge.client("127.0.1.7", "long") as client:
        client.post("/v1/completions", json=ASK | {"prompt": "x" * 60_000})
        client.post("/v1/completions", content=iter([json.dumps(ASK | {"prompt": "x" * 60_000}).encode()]))
    assert "temporary file" not in (edge.folder / "error.log").read_text()


def test_a_slash_at_the_end_is_no_redirect(edge: Edge) -> None:
    with edge.client("127.0.1.8", "slash") as client:
        assert client.post("/v1/completions/", json=ASK).status_code == 200


PRIVATE = {"/metrics", "/admin/engine", "/admin/logprobs"}


def test_clients_reach_all_that_the_server_serves_but_what_operators_use(edge: Edge) -> None:
    with edge.client("127.0.1.9", "paths") as client:
        codes = {}
        for path, methods in httpx.get(f"{edge.server}/openapi.json").json()["paths"].items():
            time.sleep(0.1)
            method = "GET" if "get" in methods else "POST"
            answer = client.request(
                method, path.replace("{name}", "smollm2"), headers={"Authorization": f"Bearer {path}"}
            )
            codes[path] = answer.json()["error"]["message"] if answer.is_error else "200"
    assert {path for path, code in codes.items() if code == "no such endpoint"} == PRIVATE & set(codes)


def test_only_an_edge_gets_past_a_hosts_own_nginx(edge: Edge, tmp_path: Path) -> None:
    ours = edge.folder / "llamaherd"
    sign = f"{nginx.SELF_SIGNED} -keyout f1.key -out f1.crt -subj /CN=f1 -CA {ours}/tls.crt -CAkey {ours}/tls.key"
    subprocess.run(sign.split(), cwd=tmp_path, check=True, capture_output=True)

    def status(crt: Path | None = None, key: Path | None = None) -> int:
        tls = ssl.create_default_context(cafile=ours / "ca.crt")
        if crt and key:
            tls.load_cert_chain(crt, key)
        with httpx.Client(verify=tls) as client:
            return client.get(f"https://127.0.0.1:{edge.inner}/v1/models").status_code

    assert status(ours / "tls.crt", ours / "tls.key") == 200
    assert status(tmp_path / "f1.crt", tmp_path / "f1.key") == 403
    assert status() == 400
