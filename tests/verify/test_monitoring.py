"""Prometheus: it runs, and reads all that it is told to read."""

from __future__ import annotations

from typing import Any

import pytest
from testinfra.host import Host


@pytest.fixture(autouse=True)
def _monitoring(promised: dict[str, Any]) -> None:
    if not promised["monitoring"]:
        pytest.skip("no monitoring host")


@pytest.mark.parametrize("unit", ["prometheus", "prometheus-blackbox-exporter", "prometheus-node-exporter"])
def test_the_units_run_now_and_at_boot(host: Host, unit: str) -> None:
    assert host.service(unit).is_running
    assert host.service(unit).is_enabled


def test_everything_is_read(promised: dict[str, Any]) -> None:
    jobs = {scrape["labels"]["job"] for scrape in promised["scrapes"]}
    assert {"llamaherd", "tls", "prometheus"} <= jobs
    assert [scrape for scrape in promised["scrapes"] if scrape["health"] != "up"] == []


def test_its_key_is_not_for_everyone(host: Host) -> None:
    key = host.file("/etc/prometheus/llamaherd/tls.key")
    assert (key.user, key.group, key.mode) == ("root", "prometheus", 0o640)
