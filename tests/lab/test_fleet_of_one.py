"""A host that is a fleet by itself serves on while it is upgraded."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.lab.conftest import Herd
from tests.lab.fleet import asked, digest
from tests.lab.load import bearable, streaming

pytestmark = [
    pytest.mark.lab,
    pytest.mark.fleet,
    pytest.mark.timeout(3600),
    pytest.mark.parametrize("herd", ["bookworm"], indirect=True),
]
PATIENCE_S = 280  # two engines may share two cores with whatever else runs
MODEL = "smollm2-135m-instruct"
LIMITS = {"llamaherd_server_limits": {"queue_timeout_s": PATIENCE_S}}
STATE = f"readlink /var/lib/llamaherd/models/{MODEL}.gguf; cat /etc/llamaherd/server.toml /etc/nginx/nginx.conf"
LEFT = """ls /var/lib/llamaherd/upgrade /etc/llamaherd/beside.toml /run/llamaherd-held 2>&-
systemctl is-active llamaherd-server-beside llamaherd-hold.socket"""


def test_nobody_notices_its_upgrade(herd: Herd, better: Path) -> None:
    herd.succeed("deploy.yml", "-e", json.dumps(LIMITS))
    # While it is measured, two engines share this machine's two cores.
    asking = asked(better, MODEL, llamaherd_upgrade_least_speed=0.01, **LIMITS)
    rate = bearable(herd, 0.5, edge="t1", model=MODEL)
    with streaming(herd, rate=rate, edge="t1", model=MODEL, patience_s=PATIENCE_S) as load:
        herd.succeed("upgrade.yml", "-e", asking)
    assert load.failures == []
    assert load.outcomes["ok"] >= 5
    assert digest(better) in herd.sh("t1", STATE)
    assert herd.sh("t1", f"{LEFT} || true").split() == ["inactive", "inactive"]


def test_nobody_notices_an_upgrade_that_fails(herd: Herd, better: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(better.read_bytes() + bytes(32))
    before = herd.sh("t1", STATE)
    rate = bearable(herd, 0.5, edge="t1", model=MODEL)
    with streaming(herd, rate=rate, edge="t1", model=MODEL, patience_s=PATIENCE_S) as load:
        run = herd.play("upgrade.yml", "-e", asked(model, MODEL, llamaherd_upgrade_least_speed=50, **LIMITS))
    assert "t1 serves what it served before, and the rollout stops: Verify speed after the upgrade" in run.output
    assert load.failures == []
    assert herd.sh("t1", STATE) == before
    assert herd.sh("t1", f"{LEFT} || true").split() == ["inactive", "inactive"]


def test_requests_wait_where_there_is_no_room_beside(herd: Herd, better: Path) -> None:
    older = herd.sh("t1", STATE)
    asking = asked(better, MODEL, llamaherd_upgrade_blue_green=False, llamaherd_settings={"parallel": 6}, **LIMITS)
    rate = bearable(herd, 0.3, edge="t1", model=MODEL)
    with streaming(herd, rate=rate, edge="t1", model=MODEL, patience_s=PATIENCE_S) as load:
        herd.succeed("upgrade.yml", "-e", asking)
        time.sleep(20)  # for those that waited to be answered
    assert load.failures == []
    assert load.outcomes["ok"] >= 5
    assert max(sample.ttft or 0 for sample in load.samples) > 10
    assert herd.sh("t1", STATE) != older
    assert herd.sh("t1", f"{LEFT} || true").split() == ["inactive", "inactive"]
    with streaming(herd, rate=rate, edge="t1", model=MODEL, patience_s=PATIENCE_S) as load:
        herd.succeed("rollback.yml", "-e", "llamaherd_rollback=model")
        time.sleep(10)
    assert load.failures == []
    assert digest(better) not in herd.sh("t1", STATE)
