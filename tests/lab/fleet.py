"""What the tests of fleets share: who answered which request, a third host that joins, the variables of an upgrade."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tests.lab.conftest import Herd

HOSTS = ("f1", "f2", "f3")
MODEL = "/var/lib/llamaherd/models/chat.gguf"


def served_by(fleet: Herd, since: int) -> dict[str, int]:
    """How often each host answered or failed a request, in the edge's log from line `since` on."""
    lines = fleet.sh("e1", f"tail -n +{since + 1} /var/log/nginx/access.log").splitlines()
    return {host: sum(f"{fleet.address(host)}:8443" in line for line in lines) for host in HOSTS}


def logged(fleet: Herd) -> int:
    return int(fleet.sh("e1", "cat /var/log/nginx/access.log | wc -l"))


def join(fleet: Herd) -> str:
    """Put f3 beside f1 and f2 in the inventory; returns the inventory's text from before."""
    hosts = fleet.inventory / "hosts.yml"
    two = hosts.read_text()
    hosts.write_text(two.replace("        f2:\n      vars:\n", "        f2:\n        f3:\n      vars:\n"))
    return two


def digest(model: Path) -> str:
    return hashlib.sha256(model.read_bytes()).hexdigest()


def asked(model: Path, name: str = "chat", **more: object) -> str:
    """Variables that put `model` under the name that clients know, and measure for seconds only."""
    entry = {"name": name, "sha256": digest(model), "source": {"kind": "file", "path": str(model)}}
    # Lab hosts share two cores with whatever else runs: the gate must not stop an upgrade for that.
    gate = {"llamaherd_upgrade_window_s": 3, "llamaherd_upgrade_least_speed": 0.1}
    return json.dumps({"llamaherd_models": [entry]} | gate | more)
