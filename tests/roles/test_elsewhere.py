"""A key's limits over two hosts: each server has its part, and the edge asks the next where one's is used up."""

from __future__ import annotations

import hashlib
import json
import shutil
import ssl
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.roles import nginx
from tests.server.conftest import Server, free_port, paced
from tests.server.conftest import running as server_running

pytestmark = pytest.mark.needs("nginx", "openssl")

OTHER = "debian13"
ONE = 100  # tokens that a request of the test reserves, as the paced engine counts
LIMITS = {
    "often": "requests_per_minute = 6",
    "talks": "tokens_per_day = 2000",
    "apart": "max_concurrent = 2",
}


@dataclass(frozen=True)
class Fleet:
    client: httpx.Client
    servers: list[Server]

    def ask(self, key: str, **fields: Any) -> httpx.Response:
        body = {"prompt": "x", "max_tokens": 20, "ignore_eos": True, **fields}
        return self.client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})

    def answered(self, key: str) -> list[int]:
        """How many of the key's requests each server answered with 200."""
        logs = [server.log.read_text().splitlines() for server in self.servers]
        lines = [[json.loads(line) for line in log if line.startswith("{")] for log in logs]
        return [sum(line.get("key") == key and line.get("status") == 200 for line in log) for log in lines]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("edge")
    keys = "".join(
        f'[[keys]]\nname = "{name}"\nsha256 = "{hashlib.sha256(name.encode()).hexdigest()}"\n{limit}\n'
        for name, limit in LIMITS.items()
    )
    with ExitStack() as stack:
        servers, hosts, inner = [], {}, []
        for number, host in enumerate((nginx.HOST, OTHER)):
            own = folder / host
            own.mkdir()
            (own / "keys.toml").write_text(f"share = {{ servers = 2, first = {number} }}\n{keys}")
            sections = {
                "auth": {"keys_file": str(own / "keys.toml")},
                "limits": {"usage_dir": str(own / "usage")},
            }
            servers.append(stack.enter_context(server_running(own, paced(step_ms=5), **sections)))
            ports = {"llamaherd_nginx_inner_port": free_port()}
            ports["llamaherd_server_port"] = int(servers[-1].url.split(":")[-1])
            hosts[host] = {"ansible_host": "127.0.0.1", **ports}
            inner.append(ports)
        port = free_port()
        groups = {"inference": {"hosts": hosts}, "edge": {"hosts": {nginx.HOST: None}}}
        more = {"llamaherd_nginx_port": port, "llamaherd_nginx_exempt": ["127.0.0.1"], "groups": groups}
        config = nginx.render(folder, {**more, "llamaherd_nginx_max_body": "4m"})
        stack.enter_context(nginx.running(config))
        stack.enter_context(nginx.running(_inner_alone(config, folder / OTHER, *inner)))
        tls = ssl.create_default_context(cafile=folder / "nginx/llamaherd/ca.crt")
        client = httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=tls, timeout=60)
        yield Fleet(stack.enter_context(client), servers)


def _inner_alone(config: Path, folder: Path, ours: dict[str, int], others: dict[str, int]) -> Path:
    """The configuration of the other host: what edges reach, with its own ports, and nothing for clients."""
    shutil.copytree(config.parent / "llamaherd", folder / "nginx/llamaherd")
    text = config.read_text()
    head, rest = text.split("    # nginx does not count an empty key", 1)
    inner = rest[rest.index("    # Only for edges") :]
    for name, port in ours.items():
        inner = inner.replace(str(port), str(others[name]))
    (folder / "nginx/mime.types").write_text("types {}\n")
    changed = folder / "nginx/nginx.conf"
    changed.write_text((head + inner).replace(str(config.parent), str(changed.parent)))
    return changed


def test_requests_a_minute_are_those_of_both_and_no_more(fleet: Fleet) -> None:
    replies = [fleet.ask("often") for _ in range(9)]
    assert [reply.status_code for reply in replies] == [200] * 6 + [429] * 3
    assert fleet.answered("often") == [3, 3]
    assert replies[-1].json()["error"]["message"].startswith("key 'often' is limited to 6 requests per minute")
    assert 0 < int(replies[-1].headers["Retry-After"]) <= 20
    assert replies[-1].headers["x-ratelimit-limit-requests"] == "6"
    assert not {"x-accel-redirect", "x-llamaherd-share"} & {name.lower() for name in replies[-1].headers}


def test_a_budget_is_used_up_to_the_last_request_that_it_has_room_for(fleet: Fleet) -> None:
    used, refused = 0, 0
    while refused < 3:
        reply = fleet.ask("talks", prompt="y" * 80)
        if reply.status_code == 200:
            used += reply.json()["usage"]["total_tokens"]
        else:
            assert (reply.status_code, reply.json()["error"]["code"]) == (429, "insufficient_quota")
            refused += 1
    assert 2000 - 2 * ONE < used <= 2000
    assert min(fleet.answered("talks")) > 0


def test_a_client_that_names_a_place_itself_changes_nothing(fleet: Fleet) -> None:
    reply = fleet.client.post(
        "/v1/completions",
        json={"prompt": "x", "max_tokens": 1},
        headers={"Authorization": "Bearer often", "X-Llamaherd-Elsewhere": "@elsewhere_1"},
    )
    assert reply.status_code == 429


def test_a_host_that_is_down_is_passed_over(fleet: Fleet) -> None:
    fleet.servers[1].process.terminate()
    fleet.servers[1].process.wait()
    replies = [fleet.ask("often") for _ in range(4)]
    assert {reply.status_code for reply in replies} == {429}
    assert {reply.json()["error"]["code"] for reply in replies} == {"rate_limit_exceeded"}
    assert fleet.ask("apart").status_code == 200
