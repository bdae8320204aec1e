"""llamaherd_nginx_balance prefix: one nginx, an edge and four hosts at four addresses, before what answers at once."""

from __future__ import annotations

import json
import re
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.roles import nginx
from tests.server.conftest import free_port

pytestmark = pytest.mark.needs("nginx", "openssl")

HOSTS = 4
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"


@dataclass(frozen=True)
class Edge:
    client: httpx.Client
    log: Path

    def hosts(self, *bodies: dict[str, Any], **headers: str) -> list[str]:
        """The host that gets each of these requests."""
        before = len(self.log.read_text().splitlines())
        for body in bodies:
            self.client.post("/v1/chat/completions", json=body, headers=headers).raise_for_status()
        while len(lines := self.log.read_text().splitlines()[before:]) < len(
            bodies
        ):  # nginx logs after it has answered
            time.sleep(0.01)
        return [json.loads(line)["upstream"].partition(":")[0] for line in lines]


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    folder = tmp_path_factory.mktemp("nginx")
    names = [nginx.HOST, *(f"h{number}" for number in range(2, HOSTS + 1))]
    hosts = {name: {"ansible_host": f"127.0.0.{number}"} for number, name in enumerate(names, 1)}
    groups = {"inference": {"hosts": hosts}, "edge": {"hosts": {nginx.HOST: None}}}
    ports = {"llamaherd_nginx_port": free_port(), "llamaherd_nginx_inner_port": free_port()}
    more = {"llamaherd_nginx_balance": "prefix", "llamaherd_nginx_exempt": ["127.0.0.0/8"], "groups": groups}
    with nginx.answering(answer) as port:
        config = nginx.render(folder, {**ports, "llamaherd_server_port": port, **more})
        # The hosts' own lines are of no interest here.
        inner = config.read_text().rpartition("# Only for edges")
        config.write_text(inner[0] + inner[1] + re.sub(r"access_log [^;]+;", "access_log off;", inner[2]))
        with nginx.running(config):
            tls = ssl.create_default_context(cafile=config.parent / "llamaherd/ca.crt")
            url = f"https://127.0.0.1:{ports['llamaherd_nginx_port']}"
            with httpx.Client(base_url=url, verify=tls, timeout=60) as client:
                client.headers["Authorization"] = "Bearer one-key"
                yield Edge(client, config.parent / "access.log")


def answer(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(ANSWER)


def turns(chat: int) -> list[dict[str, Any]]:
    """The requests of a chat: one system prompt for all, and each turn has those before it."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief. " * 20}]
    requests = []
    for turn in range(3):
        text = f"Chat {chat}, turn {turn}."
        parts = {"role": "user", "content": [{"type": "text", "text": text}]}
        messages = [*messages, parts if chat % 2 else {"content": text, "role": "user"}]
        requests.append({"model": "m", "messages": messages, "stream": bool(turn)})
        messages = [*messages, {"role": "assistant", "content": f"Answer {turn}."}]
    return requests


def test_all_turns_of_a_chat_go_to_one_host_and_chats_to_all(edge: Edge) -> None:
    found = [edge.hosts(*turns(chat)) for chat in range(40)]
    assert all(len(hosts) == 3 and len(set(hosts)) == 1 for hosts in found)
    assert len({hosts[0] for hosts in found}) == HOSTS


def test_a_clients_own_key_goes_before_the_messages(edge: Edge) -> None:
    bodies = [{**request, "prompt_cache_key": "one"} for chat in range(8) for request in turns(chat)]
    assert len(set(edge.hosts(*bodies))) == 1


def test_a_session_goes_before_both(edge: Edge) -> None:
    bodies = [{**request, "prompt_cache_key": str(chat)} for chat in range(8) for request in turns(chat)]
    assert len(set(edge.hosts(*bodies, **{"X-Session-ID": "one"}))) == 1


def test_requests_without_any_go_by_their_api_key(edge: Edge) -> None:
    assert len(set(edge.hosts(*({"prompt": f"Count to {number}."} for number in range(8))))) == 1
