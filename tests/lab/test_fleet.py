"""An edge before several hosts: it balances, leaves out what fails, and users see no upgrade."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.conftest import BIN, ROOT, Herd
from tests.lab.load import Load, streaming

pytestmark = [pytest.mark.lab, pytest.mark.fleet, pytest.mark.timeout(1800)]
RUN_DIR = "/run/llamaherd-lab6"  # as the inventory says
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


def test_status_is_a_table_of_all_hosts(fleet: Herd) -> None:
    shown = fleet.succeed("status.yml").output
    rows = dict(re.findall(r"- (\w+)\s+(ready|edge) ", shown))
    assert rows == {"e1": "edge", "f1": "ready", "f2": "ready"}


MODEL = "readlink /var/lib/llamaherd/models/chat.gguf"


def asked(model: Path, **more: object) -> str:
    """Variables that put `model` under the name that clients know, and measure for seconds only."""
    entry = {
        "name": "chat",
        "sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        "source": {"kind": "file", "path": str(model)},
    }
    # Lab hosts share two cores with whatever else runs: the gate must not stop an upgrade for that.
    gate = {"llamaherd_upgrade_window_s": 3, "llamaherd_upgrade_least_speed": 0.1}
    return json.dumps({"llamaherd_models": [entry]} | gate | more)


@pytest.fixture(scope="module")
def better(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in another quantisation."""
    path = tmp_path_factory.mktemp("model") / "better.gguf"
    quantize = Path(os.environ["LLAMAHERD_TEST_BIN_DIR"]) / "llama-quantize"
    command = [str(quantize), "--allow-requantize", os.environ["LLAMAHERD_TEST_MODEL"], str(path), "Q4_0"]
    subprocess.run(command, check=True, capture_output=True)
    return path


def test_nobody_notices_a_rolling_upgrade_and_the_way_back(fleet: Herd, better: Path) -> None:
    before = [fleet.sh(host, MODEL) for host in ("f1", "f2")]
    with streaming(fleet, rate=0.5) as load:
        fleet.succeed("upgrade.yml", "-e", asked(better))
    assert load.failures == []
    assert load.outcomes["ok"] >= 20
    wanted = hashlib.sha256(better.read_bytes()).hexdigest() + ".gguf\n"
    assert [fleet.sh(host, MODEL) for host in ("f1", "f2")] == [wanted, wanted]
    assert " down;" not in fleet.sh("e1", "cat /etc/nginx/nginx.conf")
    with streaming(fleet, rate=0.5) as load:
        fleet.succeed("rollback.yml", "-e", "llamaherd_rollback=model")
    assert load.failures == []
    assert [fleet.sh(host, MODEL) for host in ("f1", "f2")] == before


@pytest.mark.parametrize(
    ("fault", "more", "says", "touched"),
    [
        pytest.param("sha256", {}, "0" * 64, False, id="corrupt"),
        pytest.param("", {"llamaherd_settings": {"parallel": 64, "ctx_per_slot": 400000}}, "GiB", False, id="too big"),
        pytest.param("", {"llamaherd_upgrade_least_speed": 50}, "tokens/s", True, id="slow"),
        pytest.param("weights", {}, "", True, id="no token comes of it"),
    ],
)
def test_an_upgrade_that_fails_leaves_the_fleet_as_it_was(
    fleet: Herd, better: Path, tmp_path: Path, fault: str, more: dict[str, object], says: str, touched: bool
) -> None:
    model = tmp_path / "model.gguf"
    shutil.copy(better, model)
    if fault == "weights":
        spoil(model)
    variables = json.loads(asked(model, **more))
    if fault == "sha256":
        variables["llamaherd_models"][0]["sha256"] = "0" * 64
    state = f"{MODEL}; cat /etc/llamaherd/server.toml; readlink /opt/llamaherd/*/current"
    before = {host: fleet.sh(host, state) for host in ("f1", "f2")}
    untouched = fleet.sh("f2", "systemctl show -P InvocationID llamaherd-server")
    with streaming(fleet, rate=0.5) as load:
        run = fleet.play("upgrade.yml", "-e", json.dumps(variables))
    assert run.rc != 0
    assert says in run.output
    assert ("serves what it served before" in run.output) == touched
    assert load.failures == []
    assert {host: fleet.sh(host, state) for host in ("f1", "f2")} == before
    assert fleet.sh("f2", "systemctl show -P InvocationID llamaherd-server") == untouched
    assert fleet.sh("f1", "systemctl is-active llamaherd-server") == "active\n"
    assert " down;" not in fleet.sh("e1", "cat /etc/nginx/nginx.conf")


def spoil(model: Path) -> None:
    """NaN for every weight's scale in the second half: the header is good, and the model loads."""
    size = model.stat().st_size
    with model.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\xff" * (size - size // 2))


def test_the_next_run_takes_up_what_a_dead_controller_left(fleet: Herd, better: Path) -> None:
    command = [str(BIN / "ansible-playbook"), "-i", str(fleet.inventory), "playbooks/upgrade.yml", "-e", asked(better)]
    controller = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    with streaming(fleet, rate=0.5) as load:
        while " down;" not in fleet.sh("e1", "cat /etc/nginx/nginx.conf"):
            assert controller.poll() is None
            time.sleep(0.5)
        os.killpg(controller.pid, signal.SIGKILL)
        controller.wait()
        fleet.succeed("upgrade.yml", "-e", asked(better))
    assert load.failures == []
    wanted = hashlib.sha256(better.read_bytes()).hexdigest() + ".gguf\n"
    assert [fleet.sh(host, MODEL) for host in ("f1", "f2")] == [wanted, wanted]
    assert " down;" not in fleet.sh("e1", "cat /etc/nginx/nginx.conf")
    assert fleet.sh("f1", "ls -d /var/lib/llamaherd/upgrade 2>/dev/null || true") == ""
    fleet.succeed("rollback.yml", "-e", "llamaherd_rollback=model")


def test_a_renewed_certificate_costs_no_stream(fleet: Herd) -> None:
    serial = "openssl x509 -noout -serial -in /etc/nginx/llamaherd/tls.crt"
    before = fleet.sh("e1", serial)
    with streaming(fleet, rate=1) as load:
        fleet.succeed("deploy.yml", "--tags", "nginx", "-e", '{"llamaherd_nginx_renew_days": 396}')
    assert load.failures == []
    assert fleet.sh("e1", serial) != before


def test_a_bad_variable_leaves_the_old_configuration_serving(fleet: Herd) -> None:
    before = fleet.sh("e1", "cat /etc/nginx/nginx.conf")
    with streaming(fleet, rate=1) as load:
        run = fleet.play("deploy.yml", "--tags", "nginx", "--limit", "e1", "-e", "llamaherd_nginx_max_body=4x")
    assert run.rc != 0
    assert "nginx keeps its old configuration" in run.output
    assert load.failures == []
    assert fleet.sh("e1", "cat /etc/nginx/nginx.conf") == before


def test_hosts_come_and_go_by_the_inventory(fleet: Herd) -> None:
    hosts = fleet.inventory / "hosts.yml"
    before, two = logged(fleet), hosts.read_text()
    with streaming(fleet, rate=0.5) as load:
        hosts.write_text(two.replace("        f2:\n      vars:\n", "        f2:\n        f3:\n      vars:\n"))
        fleet.succeed("deploy.yml")
    assert load.failures == []
    assert served_by(fleet, before)["f3"] >= 1
    with streaming(fleet, rate=0.5) as load:
        hosts.write_text(two)
        fleet.succeed("deploy.yml")
        gone = logged(fleet)
    assert load.failures == []
    assert served_by(fleet, gone)["f3"] == 0


# The last one: f2 does not come back.
def test_a_host_without_power_costs_only_its_own_streams(fleet: Herd) -> None:
    pid = f"$(cat {RUN_DIR}/f2.pid)"
    with streaming(fleet, rate=1) as load:
        subprocess.run(["sh", "-c", f"kill -9 {pid}"], check=True)
        time.sleep(10)
    only_running_streams_failed(load)
    with streaming(fleet, rate=1) as load:
        pass
    assert load.failures == []
