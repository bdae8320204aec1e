"""What is open beyond loopback, on edges and on the hosts behind them."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import pytest
from testinfra.host import Host

from tests.verify.client import Client

MONITORING = {"prometheus.service"} | {f"prometheus-{name}-exporter.service" for name in ("node", "nginx", "blackbox")}


def test_only_nginx_listens_beyond_loopback(host: Host, promised: dict[str, Any]) -> None:
    beyond = [entry for entry in promised["listeners"] if not ip_address(entry["address"]).is_loopback]
    allowed = {("nginx.service", port) for port in promised["nginx_ports"]}
    for entry in beyond:
        who = (entry["unit"], entry["port"])
        if entry["unit"] in ("nginx.service", *(f"{unit}.service" for unit in promised["units"])):
            assert who in allowed or entry["port"] in promised["site_ports"], f"{entry} listens beyond loopback"
        elif promised["exclusive"]:
            assert entry["command"] == "sshd", f"{entry} listens beyond loopback"
    assert allowed <= {(entry["unit"], entry["port"]) for entry in beyond}


def test_the_way_in_for_edges_asks_for_their_certificate(promised: dict[str, Any]) -> None:
    if not promised["inner_url"]:
        pytest.skip("no edge asks this host")
    assert Client(promised["inner_url"], promised["inner_ca"], "").request("GET", "/livez", key=None).status == 400


def test_metrics_are_for_prometheus_alone(promised: dict[str, Any]) -> None:
    if promised["metrics_url"] is None or urlsplit(promised["metrics_url"]).port not in promised["nginx_ports"]:
        pytest.skip("nobody reads this host's metrics from elsewhere")
    client = Client(promised["metrics_url"], promised["inner_ca"], "")
    assert client.request("GET", "/metrics/node", key=None).status == 400


def test_what_monitors_listens_on_loopback_alone(promised: dict[str, Any]) -> None:
    ours = [entry for entry in promised["listeners"] if entry["unit"] in MONITORING]
    if promised["monitoring"]:
        assert {entry["unit"] for entry in ours} >= {"prometheus.service", "prometheus-blackbox-exporter.service"}
    for entry in ours:
        if entry["unit"] != "prometheus.service":  # which llamaherd_monitoring_address may put elsewhere
            assert ip_address(entry["address"]).is_loopback, entry
