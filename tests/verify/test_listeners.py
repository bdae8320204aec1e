"""What is open beyond loopback, on edges and on the hosts behind them."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest
from testinfra.host import Host

from tests.verify.client import Client


def test_only_nginx_listens_beyond_loopback(host: Host, promised: dict[str, Any]) -> None:
    beyond = [entry for entry in promised["listeners"] if not ip_address(entry["address"]).is_loopback]
    allowed = {("nginx.service", port) for port in promised["nginx_ports"]}
    for entry in beyond:
        who = (entry["unit"], entry["port"])
        if entry["unit"] in ("nginx.service", *(f"{unit}.service" for unit in promised["units"])):
            assert who in allowed, f"{entry} listens beyond loopback"
        elif promised["exclusive"]:
            assert entry["command"] == "sshd", f"{entry} listens beyond loopback"
    assert allowed <= {(entry["unit"], entry["port"]) for entry in beyond}


def test_the_way_in_for_edges_asks_for_their_certificate(promised: dict[str, Any]) -> None:
    if not promised["inner_url"]:
        pytest.skip("no edge asks this host")
    assert Client(promised["inner_url"], promised["inner_ca"], "").request("GET", "/livez", key=None).status == 400
