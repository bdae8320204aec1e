"""An edge before hosts of other models: each nginx as the role configures it, each server with a paced engine."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.roles import nginx
from tests.roles.conftest import Render
from tests.server.conftest import free_port, paced
from tests.server.conftest import running as server_running

pytestmark = pytest.mark.needs("nginx", "openssl")

OTHER = "debian13"
CHAT, CODE, ALIAS = "chat", "org/code 1.5", "coder"
CHATS = [{"role": "user", "content": 'Count. "model": "chat" \\'}]
LITTLE = {"max_tokens": 2}


def serving(model: str, *aliases: str) -> dict[str, Any]:
    """Variables of a host."""
    source = {"kind": "https", "url": f"https://models.example/{len(model)}.gguf"}
    entry = {"name": model, "sha256": f"{len(model):x}" * 64, "source": source, "aliases": list(aliases)}
    return {"llamaherd_model": model, "llamaherd_models": [entry]}


@dataclass(frozen=True)
class Unlike:
    client: httpx.Client
    servers: dict[str, str]  # URLs by model
    config: Path  # the edge's nginx.conf

    def post(self, path: str, body: dict[str, Any] | bytes, **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.client.post(path, content=content, headers={"Content-Type": "application/json", **headers})

    def answered(self, model: str) -> int:
        """How many answers to POST requests that model's server counts."""
        page = httpx.get(f"{self.servers[model]}/metrics").text
        return sum(
            int(float(n)) for n in re.findall(r'^llamaherd_http_responses_total\{method="POST".*\} (\S+)$', page, re.M)
        )


@pytest.fixture(scope="module")
def unlike(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unlike]:
    edge, other = tmp_path_factory.mktemp("edge"), tmp_path_factory.mktemp("other")
    with ExitStack() as stack:
        hosts, servers, ports = {}, {}, []
        for host, folder, model, *aliases in ((nginx.HOST, edge, CHAT), (OTHER, other, CODE, ALIAS)):
            called = {"name": model, "aliases": aliases}
            server = stack.enter_context(
                server_running(folder, paced(step_ms=1), model=called, engine={"parallel": 4, "ctx_per_slot": 8192})
            )
            inner = {"llamaherd_nginx_inner_port": free_port(), "llamaherd_server_port": int(server.url.split(":")[-1])}
            hosts[host] = {"ansible_host": "127.0.0.1", **inner, **serving(model, *aliases)}
            servers[model] = server.url
            ports.append((*inner.values(), free_port()))
        port = ports[0][-1]
        groups = {"inference": {"hosts": hosts}, "edge": {"hosts": {nginx.HOST: None}}}
        more = {"llamaherd_nginx_port": port, "llamaherd_nginx_exempt": ["127.0.0.1"], "groups": groups}
        config = nginx.render(edge, {**more, "llamaherd_nginx_max_body": "16m"})
        stack.enter_context(nginx.running(config))
        stack.enter_context(nginx.running(_as_other(config, other, dict(zip(*ports, strict=True)))))
        tls = ssl.create_default_context(cafile=edge / "nginx/llamaherd/ca.crt")
        client = httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=tls, timeout=60)
        yield Unlike(stack.enter_context(client), servers, config)


def _as_other(config: Path, folder: Path, ports: dict[int, int]) -> Path:
    """The configuration of a host that differs in its ports alone; that it is an edge too, nobody asks."""
    shutil.copytree(config.parent / "llamaherd", folder / "nginx/llamaherd")
    upstreams, text = re.split(r"(?=\n    upstream inference )", config.read_text(), maxsplit=1)
    edges, behind = re.split(r"(?=\n    # Only for edges)", text)
    for ours, others in ports.items():
        edges, behind = edges.replace(f"0.0.0.0:{ours}", f"0.0.0.0:{others}"), behind.replace(f"{ours}", f"{others}")
    (folder / "nginx/mime.types").write_text("types {}\n")
    changed = folder / "nginx/nginx.conf"
    changed.write_text((upstreams + edges + behind).replace(str(config.parent), str(changed.parent)))
    return changed


REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": CHATS, **LITTLE},
    "/v1/completions": {"prompt": "Count.", **LITTLE},
    "/v1/messages": {"messages": CHATS, **LITTLE},
    "/v1/messages/count_tokens": {"messages": CHATS},
    "/v1/responses": {"input": "Count.", "max_output_tokens": 2},
    "/completion": {"prompt": "Count.", "n_predict": 2},
    "/v1/embeddings": {"input": "Count."},
    "/tokenize": {"content": "Count."},
    "/apply-template": {"messages": CHATS},
}


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize(("name", "model"), [(CHAT, CHAT), (CODE, CODE), (ALIAS, CODE)])
def test_a_request_reaches_the_server_of_its_model_and_no_other(
    unlike: Unlike, path: str, name: str, model: str
) -> None:
    before = {one: unlike.answered(one) for one in unlike.servers}
    answer = unlike.post(path, {**REQUESTS[path], "model": name})
    assert answer.status_code == 200, answer.text
    after = {one: unlike.answered(one) for one in unlike.servers}
    assert {one: after[one] - before[one] for one in after} == {one: int(one == model) for one in after}


def test_a_stream_comes_from_the_server_of_its_model(unlike: Unlike) -> None:
    body = {"messages": CHATS, "max_tokens": 20, "stream": True, "model": ALIAS}
    with unlike.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    assert {event["model"] for event in events} == {CODE}
    assert len(events) > 20


IMAGE = base64.b64encode(os.urandom(2_500_000)).decode()
WRITTEN = {
    "after a long text": json.dumps({"prompt": IMAGE[:20_000], **LITTLE, "model": CODE}),
    "escaped": json.dumps({"model": CODE, "prompt": "x", **LITTLE}).replace("/", r"\/"),
    "on lines": json.dumps({"prompt": "x", **LITTLE, "model": CODE}, indent=2),
    "beside others": json.dumps({"logit_bias": {}, "stop": "model", "prompt": '"model":"x"', **LITTLE, "model": CODE}),
}


@pytest.mark.parametrize("how", WRITTEN)
def test_the_model_is_found_however_the_body_is_written(unlike: Unlike, how: str) -> None:
    answer = unlike.post("/v1/completions", WRITTEN[how].encode())
    assert (answer.status_code, answer.json().get("model")) == (200, CODE), answer.text


def test_the_model_is_found_after_an_image(unlike: Unlike) -> None:
    before = unlike.answered(CODE)
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{IMAGE}"}}
    answer = unlike.post("/v1/chat/completions", {"messages": [{"role": "user", "content": [image]}], "model": CODE})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported"), answer.text  # no projector
    assert unlike.answered(CODE) == before + 1


def test_the_model_of_what_a_body_holds_is_not_its_own(unlike: Unlike) -> None:
    parameters = {"type": "object", "properties": {"model": {"type": "string"}}, "default": {"model": CHAT}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    answer = unlike.post("/v1/chat/completions", {"tools": tools, "messages": CHATS, **LITTLE, "model": CODE})
    assert (answer.status_code, answer.json().get("model")) == (200, CODE), answer.text


def test_a_body_in_chunks(unlike: Unlike) -> None:
    body = json.dumps({"prompt": "x" * 3000, **LITTLE, "model": CODE}).encode()
    answer = unlike.client.post(
        "/v1/completions", content=iter([body[:10], body[10:]]), headers={"Content-Type": "application/json"}
    )
    assert answer.json()["model"] == CODE


def test_all_models_are_listed_once(unlike: Unlike) -> None:
    for _ in range(4):  # whichever host answers
        listed = unlike.client.get("/v1/models").json()["data"]
        assert [model["id"] for model in listed] == [CHAT, CODE]
        assert all(model["object"] == "model" for model in listed)


@pytest.mark.parametrize("name", [CODE, "org%2Fcode%201.5", ALIAS])
def test_what_is_read_of_a_model_comes_from_its_server(unlike: Unlike, name: str) -> None:
    assert unlike.client.get(f"/v1/models/{name}").json()["aliases"] == [ALIAS]
    assert unlike.client.get(f"/props?model={name}").json()["model_alias"] == CODE


def test_without_a_name_it_is_the_first_hosts_model(unlike: Unlike) -> None:
    for _ in range(4):
        assert unlike.post("/v1/completions", {"prompt": "x", **LITTLE}).json()["model"] == CHAT
        assert unlike.client.get("/props").json()["model_alias"] == CHAT


@pytest.mark.parametrize("name", ["gpt-4", "Chat", "org/code", "inference", "inference_1", "", "$host", 'a"b'])
def test_an_unknown_model_is_a_404_that_lists_all(unlike: Unlike, name: str) -> None:
    if not name:
        pytest.skip("no name at all")
    answer = unlike.post("/v1/chat/completions", {"messages": CHATS, "model": name})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert error["message"].endswith("; available: 'chat', 'org/code 1.5'")
    answer = unlike.post("/v1/messages", {"messages": CHATS, "model": name, **LITTLE})
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")
    assert unlike.client.get("/v1/models/gpt-4").json()["error"]["message"].endswith("'chat', 'org/code 1.5'")


def test_no_header_of_a_client_leads_anywhere(unlike: Unlike) -> None:
    headers = {
        "X-Accel-Redirect": "/v1/models",
        "X-Llamaherd-Models": "nonsense",
        "X-Llamaherd-Upstream": "inference_2",
        "X-Model": CODE,
    }
    answer = unlike.post("/v1/completions", {"prompt": "x", **LITTLE, "model": CHAT}, **headers)
    assert answer.json()["model"] == CHAT
    unknown = unlike.post("/v1/completions", {"prompt": "x", "model": "gpt-4"}, **headers)
    assert "nonsense" not in unknown.text
    assert "nonsense" not in unlike.client.get("/v1/models", headers=headers).text
    assert unlike.client.get("/_llamaherd/read").status_code == 404


def test_a_refused_request_goes_to_another_host_of_its_model(tmp_path: Path) -> None:
    """Three hosts behind the edge, two of them with one model: one nginx at three addresses; behind it all is 503."""
    seen: list[bytes] = []

    def refuse(connection: socket.socket) -> None:
        seen.append(connection.recv(65536))
        connection.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    names = {nginx.HOST: "chat", "second": "chat", "third": "code"}
    hosts = {host: {"ansible_host": f"127.0.0.{n}", **serving(one)} for n, (host, one) in enumerate(names.items(), 1)}
    groups = {"inference": {"hosts": hosts}, "edge": {"hosts": {nginx.HOST: None}}}
    ports = {"llamaherd_nginx_port": free_port(), "llamaherd_nginx_inner_port": free_port()}
    with nginx.answering(refuse) as server_port:
        config = nginx.render(tmp_path, {**ports, "llamaherd_server_port": server_port, "groups": groups})
        with nginx.running(config):
            tls = ssl.create_default_context(cafile=config.parent / "llamaherd/ca.crt")
            url = f"https://127.0.0.1:{ports['llamaherd_nginx_port']}/v1/completions"
            answers = [
                httpx.post(url, json={"prompt": "x", "model": model}, verify=tls, timeout=60)
                for model in ("chat", "code")
            ]
    assert [answer.status_code for answer in answers] == [503, 503]
    asked = [json.loads(request.partition(b"\r\n\r\n")[2])["model"] for request in seen]
    assert asked == ["chat", "chat", "code"]


def test_hosts_that_serve_the_same_are_balanced_as_ever(unlike: Unlike, render: Render) -> None:
    hosts = {host: serving("chat") for host in (nginx.HOST, OTHER)}
    same, other = (
        render(nginx.HOST, groups={"inference": {"hosts": hosts}}).text("nginx.conf"),
        unlike.config.read_text(),
    )
    for part in ("mirror ", "$llamaherd_upstream", "X-Llamaherd-Models", "client_body_in_single_buffer"):
        assert part not in same
        assert part in other
    assert [len(re.findall(r"    upstream inference(_\d+)? ", text)) for text in (same, other)] == [1, 3]
    assert same.count(f"; # {OTHER}\n") == 1
    assert other.count(f"; # {OTHER}\n") == 2, "the lines that playbooks/upgrade.yml finds"
