"""`make demo` as a newcomer types it, killed half way and run again, and `make demo-down` after it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from demo.show import curl
from tests.conftest import lab_obstacle
from tests.lab.conftest import ROOT

pytestmark = pytest.mark.timeout(2400)


def make(target: str) -> str:
    done = subprocess.run(["make", target], cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-20_000:], done.stderr[-5_000:])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def traces() -> list[str]:
    """What a demo could leave on this machine."""
    found = [line for line in Path("/proc/mounts").read_text().splitlines() if "llamaherd/lab/hosts/herd1" in line]
    found += subprocess.run(
        ["pgrep", "-af", "[s]ystemd-nspawn .*hosts/herd1/"], capture_output=True, text=True, check=False
    ).stdout.split("\n")
    found += [str(path) for path in [Path("/sys/class/net/herd0"), Path("/run/llamaherd-lab")] if path.exists()]
    rules = subprocess.run(["iptables", "-t", "nat", "-S"], capture_output=True, text=True, check=True).stdout
    return [*filter(None, found), *(rule for rule in rules.splitlines() if "198.18.0.0" in rule)]


@pytest.fixture(scope="class")
def demo() -> Iterator[dict[str, object]]:
    """build/demo.json of a demo that follows one that was killed half way."""
    try:
        killed = subprocess.Popen(["make", "demo"], cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + 300
        while not any("herd1" in trace for trace in traces()):
            assert time.monotonic() < deadline, "the demo booted no host"
            time.sleep(0.5)
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
        assert traces()
        output = make("demo")
        result: dict[str, object] = json.loads((ROOT / "build/demo.json").read_text())
        yield result | {"output": output}
    finally:
        make("demo-down")


@pytest.mark.lab
class TestOnALabHost:
    def test_it_measured_and_chose(self, demo: dict[str, object]) -> None:
        assert demo["mode"] == "lab"
        assert demo["left_out"] is None
        assert demo["verdict"] in ("change", "keep")
        table = demo["table"]
        assert isinstance(table, list)
        measured = [row for row in table if row.get("output_tokens_per_s")]
        assert len(measured) >= 3
        assert Path(str(demo["report"])).read_text().startswith("<!doctype html>")

    def test_the_curl_line_works_as_pasted(self, demo: dict[str, object]) -> None:
        secrets = ROOT / "inventories/lab/.secrets"
        line = curl(str(demo["endpoint"]), secrets / "keys/default", Path(str(demo["ca_path"])))
        assert line in str(demo["output"])
        reply = subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert json.loads(reply)["choices"][0]["message"]["content"]

    def test_demo_down_leaves_no_trace(self, demo: dict[str, object]) -> None:
        make("demo-down")
        assert traces() == []


def test_where_no_host_can_boot_the_demo_runs_a_plain_process() -> None:
    """As in a locked-down container: root, but nothing may be mounted."""
    lock_down = [] if lab_obstacle() else ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    try:
        done = subprocess.run(
            [*lock_down, "make", "demo", "BUDGET=60s"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        print(done.stdout[-20_000:], done.stderr[-5_000:])
        assert done.returncode == 0
        left_out = [line for line in done.stdout.splitlines() if line.startswith("Left out: systemd, nginx and TLS")]
        assert len(left_out) == 1
        assert "playbooks/deploy.yml" in left_out[0]
        result = json.loads((ROOT / "build/demo.json").read_text())
        assert result["mode"] == "process"
        assert result["left_out"]
        line = curl(result["endpoint"], ROOT / "inventories/loopback/.secrets/keys/default", None)
        reply = subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert json.loads(reply)["choices"][0]["message"]["content"]
    finally:
        make("demo-down")
    with pytest.raises(httpx.ConnectError):
        httpx.get(result["endpoint"].removesuffix("/v1") + "/livez", timeout=5)
