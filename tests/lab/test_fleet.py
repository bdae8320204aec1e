"""An edge before several hosts that serve the real model: it balances, and leaves out what fails."""

from __future__ import annotations

import re
import subprocess
import time

import pytest

from tests.lab.conftest import Herd
from tests.lab.fleet import cut_off, join, logged, served_by
from tests.lab.load import only_running_streams_failed, streaming

pytestmark = [pytest.mark.lab, pytest.mark.fleet, pytest.mark.timeout(3600)]
SLOTS = 2  # of each host
PATIENCE_S = 30  # a request that waited for a host which is gone fails within the test


def test_every_host_is_as_its_inventory_promises(fleet: Herd) -> None:
    fleet.succeed("verify.yml")


def test_load_is_spread_over_the_hosts(fleet: Herd) -> None:
    before = logged(fleet)
    with streaming(fleet, rate=2) as load:
        pass
    assert load.failures == []
    counts = served_by(fleet, before)
    assert counts["f1"] >= 3
    assert counts["f2"] >= 3


def test_a_killed_server_costs_only_its_own_streams_and_comes_back_by_itself(fleet: Herd) -> None:
    with streaming(fleet, rate=2) as load:
        fleet.sh("f1", "systemctl kill --kill-whom=main --signal=KILL llamaherd-server")
        fleet.sh("f1", "until systemctl is-active -q llamaherd-server; do sleep 0.2; done")
        back = logged(fleet)
    only_running_streams_failed(load, SLOTS, server_ended=True)
    assert served_by(fleet, back)["f1"] >= 1


def test_status_is_a_table_of_all_hosts(fleet: Herd) -> None:
    shown = fleet.succeed("status.yml").output
    columns = r"host\s+state\s+llama.cpp\s+server\s+model\s+settings\s+slots\s+queue\s+tokens/s\s+certificate"
    assert re.search(columns, shown)
    build, settings = r"[\d.]+-cpu-\w+\s+\w{12}", r"2048/512/1024\s+\d/2\s+\d+\s+[\d.]+"
    for host in ("f1", "f2"):
        assert re.search(rf"\n +{host}\s+ready\s+{build}\s+chat\s+{settings}\s+\d+ days", shown), host
    assert re.search(r"\n +e1\s+edge .* \d+ days", shown)


def test_hosts_come_and_go_by_the_inventory(fleet: Herd) -> None:
    before = logged(fleet)
    with streaming(fleet, rate=0.5) as load:
        two = join(fleet)
        fleet.succeed("deploy.yml")
        time.sleep(PATIENCE_S)  # for requests enough that each host has some
    assert load.failures == []
    assert served_by(fleet, before)["f3"] >= 1
    with streaming(fleet, rate=0.5) as load:
        (fleet.inventory / "hosts.yml").write_text(two)
        fleet.succeed("deploy.yml")
    assert load.failures == []
    gone = logged(fleet)
    with streaming(fleet, rate=0.5):
        pass
    assert served_by(fleet, gone)["f3"] == 0


def test_a_host_without_power_costs_only_its_own_streams_and_comes_back_with_it(fleet: Herd) -> None:
    with streaming(fleet, rate=0.5, patience_s=PATIENCE_S) as load:
        cut_power(fleet, "f2")
        cut = logged(fleet)
        time.sleep(PATIENCE_S)
    only_running_streams_failed(load, SLOTS)
    assert served_by(fleet, cut)["f1"] >= 5
    fleet.succeed("lab.yml", "-e", "llamaherd_lab_state=present")
    fleet.sh("f2", "until systemctl is-active -q llamaherd-server; do sleep 0.2; done")
    back = logged(fleet)
    with streaming(fleet, rate=1) as load:
        pass
    assert load.failures == []
    assert served_by(fleet, back)["f2"] >= 1


def test_a_host_without_network_costs_only_its_own_streams_and_comes_back_by_itself(fleet: Herd) -> None:
    with streaming(fleet, rate=0.5, patience_s=PATIENCE_S) as load:
        with cut_off(fleet, "f2"):
            cut = logged(fleet)
            time.sleep(PATIENCE_S)
        only_f1 = served_by(fleet, cut)
        back = logged(fleet)
        time.sleep(PATIENCE_S)
    only_running_streams_failed(load, SLOTS)
    assert only_f1["f1"] >= 5
    assert served_by(fleet, back)["f2"] >= 1


def cut_power(fleet: Herd, host: str) -> None:
    """Its network first: a host that loses its power says goodbye to nobody."""
    found = re.search(r"llamaherd_lab_run_dir: (\S+)", (fleet.inventory / "hosts.yml").read_text())
    assert found
    script = f"ip link delete vb-{host}; init=$(pgrep -P $(cat {found[1]}/{host}.pid)); kill -9 $init"
    subprocess.run(["sh", "-ec", script], check=True)
