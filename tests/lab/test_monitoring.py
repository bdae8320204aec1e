"""Prometheus on a host that serves: it reads all, each panel of the dashboard has data, a reset leaves nothing."""

from __future__ import annotations

import shlex
from typing import Any
from urllib.parse import urlencode

import pytest

from tests.lab.conftest import LEFT, Herd
from tests.lab.load import streaming
from tests.monitoring.prometheus import panel_queries, samples, without_data

pytestmark = [
    pytest.mark.lab,
    pytest.mark.fleet,
    pytest.mark.timeout(3600),
    pytest.mark.parametrize("herd", ["bookworm", "trixie"], indirect=True, ids=["debian12", "debian13"]),
]
MODEL = "smollm2-135m-instruct"
ASK = """
import sys, urllib.request
print(urllib.request.urlopen("http://127.0.0.1:9090/api/v1/query", sys.argv[1].encode()).read().decode())
"""


@pytest.fixture(scope="module")
def watched(herd: Herd) -> Herd:
    """The host serves, and is in group `monitoring`."""
    hosts = herd.inventory / "hosts.yml"
    hosts.write_text(hosts.read_text().replace("    loadgen:\n", "    monitoring: {hosts: {t1: }}\n    loadgen:\n"))
    herd.succeed("deploy.yml")
    herd.succeed("monitoring.yml")
    return herd


def test_a_second_run_changes_nothing(watched: Herd) -> None:
    assert watched.succeed("monitoring.yml").changed["t1"] == 0
    assert watched.succeed("monitoring.yml", "--check").changed["t1"] == 0
    assert watched.succeed("deploy.yml").changed["t1"] == 0


def test_verify(watched: Herd) -> None:
    watched.succeed("verify.yml")


def test_every_panel_shows_data_under_load(watched: Herd) -> None:
    def query(promql: str) -> list[dict[str, Any]]:
        return samples(watched.sh("t1", f"python3 -c {shlex.quote(ASK)} {shlex.quote(urlencode({'query': promql}))}"))

    with streaming(watched, rate=1, edge="t1", model=MODEL) as load:
        assert without_data(query, panel_queries(), 180) == []
    assert load.outcomes["ok"] > 0


def test_reset_leaves_nothing_behind(watched: Herd) -> None:
    watched.succeed("reset.yml", "-e", '{"skip_confirmation": true}')
    assert watched.sh("t1", LEFT).strip() == ""
    units = "prometheus prometheus-node-exporter prometheus-nginx-exporter prometheus-blackbox-exporter"
    # nginx's exporter of Debian 12 ends with an error when it is stopped.
    assert set(watched.sh("t1", f"systemctl is-active {units} || true").split()) <= {"inactive", "failed"}
