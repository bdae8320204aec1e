"""What nginx adds to TTFT: requests to a server with a paced worker, directly and through nginx.

nginx is Debian's, on loopback, with the configuration that the role renders: once for a host that is its own edge, once
for an edge in front of a host with its own nginx and mutual TLS. Requests alternate between direct and through nginx.
TTFT starts when the request is sent on an established connection, as for a client that keeps its connections.
"""

from __future__ import annotations

import ssl
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import uvloop

from bench.frontend import bounded, paced, stream
from bench.servers import free_port
from bench.serving import ROUNDS, p95
from bench.table import Metric, Result
from tests.roles import nginx

REQUESTS = 50
BOUND_MS = 5.0


def run() -> Result:
    alone = {"ansible_host": "127.0.0.1"}
    groups = {"inference": {"hosts": {nginx.HOST: None}}, "edge": {"hosts": {nginx.HOST: None, "another": None}}}
    return {"its_own_edge": through(alone), "an_edge_before_it": through(alone | {"groups": groups})}


def through(variables: dict[str, Any]) -> dict[str, Metric]:
    """Return TTFTs in milliseconds, without the engine's time for the prompt."""
    port = free_port()
    ports = {"llamaherd_nginx_port": port, "llamaherd_nginx_inner_port": free_port()}
    limits = {"llamaherd_nginx_exempt": ["127.0.0.1"]}
    with tempfile.TemporaryDirectory() as folder, paced(parallel=4, step_ms=5) as server:
        config = nginx.render(Path(folder), variables | ports | limits | {"llamaherd_server_port": server.port})
        tls = ssl.create_default_context(cafile=config.parent / "llamaherd/ca.crt")

        async def load() -> list[tuple[list[float], list[float]]]:
            async def added(port: int, tls: ssl.SSLContext | None) -> float:
                return 1000 * (await stream(port, 2, tls=tls)).ttft_added()

            rounds = []
            for _ in range(ROUNDS + 1):
                pairs = [(await added(server.port, None), await added(port, tls)) for _ in range(REQUESTS)]
                rounds.append(([direct for direct, _ in pairs], [behind for _, behind in pairs]))
            return rounds[1:]  # the first warms up

        with nginx.running(config):
            rounds = uvloop.run(load())
    more = [median(behind) - median(direct) for direct, behind in rounds]
    return {
        "ttft_direct_p50_ms": bounded([median(direct) for direct, _ in rounds], None),
        "ttft_nginx_p50_ms": bounded([median(behind) for _, behind in rounds], None),
        "nginx_added_p50_ms": bounded(more, BOUND_MS),
        "nginx_added_p95_ms": bounded([p95(behind) - p95(direct) for direct, behind in rounds], None),
    }
