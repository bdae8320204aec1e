"""Two hosts from nothing to nothing, for each way to bring llama.cpp: one builds for both, or each builds its own."""

from __future__ import annotations

import json

import pytest

from tests.lab.conftest import LEFT, Herd

pytestmark = [pytest.mark.lab, pytest.mark.fleet, pytest.mark.timeout(3000)]

HOSTS = ("t1", "t2")
CURRENT = "readlink /opt/llamaherd/llama.cpp/current"
STARTED = "systemctl show -P ActiveEnterTimestampMonotonic llamaherd-server nginx"


@pytest.fixture(scope="module", params=["shared", "per_host"])
def strategy(request: pytest.FixtureRequest) -> str:
    return json.dumps({"llamaherd_llama_cpp_strategy": request.param})


def test_check_mode_on_virgin_hosts_touches_nothing(pair: Herd, strategy: str) -> None:
    pair.succeed("deploy.yml", "--check", "-e", strategy)
    for host in HOSTS:
        assert pair.sh(host, LEFT).strip() == ""


def test_deploy(pair: Herd, strategy: str) -> None:
    pair.succeed("deploy.yml", "-e", strategy)
    for host in HOSTS:
        assert pair.sh(host, "systemctl is-active llamaherd-server nginx").split() == ["active", "active"]
    if "shared" in strategy:
        assert pair.sh("t1", CURRENT) == pair.sh("t2", CURRENT)
        variants = pair.sh("t2", "ls /opt/llamaherd/llama.cpp/current/lib").split()
        assert len([name for name in variants if name.startswith("libggml-cpu-")]) > 5


def test_a_second_deploy_changes_nothing(pair: Herd, strategy: str) -> None:
    assert pair.succeed("deploy.yml", "-e", strategy).changed.items() >= {"t1": 0, "t2": 0}.items()


def test_check_mode_would_change_nothing(pair: Herd, strategy: str) -> None:
    assert pair.succeed("deploy.yml", "--check", "-e", strategy).changed.items() >= {"t1": 0, "t2": 0}.items()


def test_verify(pair: Herd, strategy: str) -> None:
    pair.succeed("verify.yml", "-e", strategy)


def test_one_hosts_setting_restarts_that_hosts_server(pair: Herd, strategy: str) -> None:
    before = {host: pair.sh(host, STARTED).split() for host in HOSTS}
    own = pair.inventory / "host_vars/t2.yml"
    own.parent.mkdir(exist_ok=True)
    own.write_text("llamaherd_settings: {parallel: 2}\n")
    run = pair.succeed("deploy.yml", "-e", strategy)
    own.unlink()
    after = {host: pair.sh(host, STARTED).split() for host in HOSTS}
    assert run.changed["t1"] == 0
    assert after["t1"] == before["t1"]
    assert after["t2"][0] != before["t2"][0]
    assert after["t2"][1] == before["t2"][1]


def test_reset_leaves_nothing_behind(pair: Herd, strategy: str) -> None:
    pair.succeed("reset.yml", "-e", '{"skip_confirmation": true}')
    for host in HOSTS:
        assert pair.sh(host, LEFT).strip() == ""
