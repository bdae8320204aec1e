"""An edge before several hosts: it balances, leaves out what fails, and users see no upgrade."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.conftest import Herd
from tests.lab.load import Load, streaming

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1800)]
SLOTS = 2  # of each host
STANDING = "LLAMAHERD_TEST_FLEET"  # the copied inventory of a fleet that stands already: for work on these tests


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Herd]:
    """e1 before f1 and f2, deployed; f3 is booted."""
    if standing := os.environ.get(STANDING):
        yield Herd(Path(standing))
        return
    inventory = tmp_path_factory.mktemp("inventory") / "fleet"
    shutil.copytree(Path(__file__).parent / "inventory_fleet", inventory)
    herd = Herd(inventory)
    try:
        herd.succeed("lab.yml")
        herd.succeed("deploy.yml")
        yield herd
    finally:
        herd.succeed("lab.yml", "-e", "llamaherd_lab_state=absent")


def served_by(fleet: Herd, since: int) -> dict[str, int]:
    """How often each host answered or failed a request, in the edge's log from line `since` on."""
    lines = fleet.sh("e1", f"tail -n +{since + 1} /var/log/nginx/access.log").splitlines()
    return {host: sum(f"{fleet.address(host)}:8443" in line for line in lines) for host in ("f1", "f2", "f3")}


def logged(fleet: Herd) -> int:
    return int(fleet.sh("e1", "cat /var/log/nginx/access.log | wc -l"))


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
    only_running_streams_failed(load)
    assert served_by(fleet, back)["f1"] >= 1


def only_running_streams_failed(load: Load) -> None:
    """Each failed request had sent something, its client saw that at once, and one host had no more of them."""
    assert {sample.outcome for sample in load.failures} <= {"connection", "truncated"}, load.failures
    assert all(sample.first is not None for sample in load.failures), load.failures
    assert len(load.failures) <= SLOTS
