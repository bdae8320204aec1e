"""What the tests of fleets share: who answered which request, a third host that joins, the variables of an upgrade."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.lab.conftest import Herd, booted
from tests.verify.client import Client

HOSTS = ("f1", "f2", "f3")
MODEL = "/var/lib/llamaherd/models/chat.gguf"
# Lab hosts share two cores with whatever else runs: the gate must not stop an upgrade for that.
GATE = {"llamaherd_upgrade_window_s": 8, "llamaherd_upgrade_least_speed": 0.1}
EDGE = ("deploy.yml", "--tags", "nginx", "--limit", "e1")


@contextmanager
def paced(
    folder: Path, server: str, *, parallel: int, hosts: Sequence[str] = ("f1", "f2"), **environment: float
) -> Iterator[Herd]:
    """e1 before `hosts`, all on Debian 12, over the double that paces its tokens as `environment` says.

    Those that are left out are ready to join them.
    """
    with booted(folder, ("trixie", "bookworm"), ("parallel: 2", f"parallel: {parallel}")) as fleet:
        variables = " ".join(f"{name}={value}" for name, value in environment.items())
        for host in HOSTS:
            fleet.sh(host, PREPARE.format(server=server, model=MODEL, environment=variables))
        serving(fleet, hosts)
        fleet.succeed("deploy.yml", "--tags", "config,nginx")
        yield fleet


# What deploy.yml finds in place of a build, a virtual environment and a model.
PREPARE = """set -e
useradd --system llamaherd
mkdir -p /opt/llamaherd/server/paced $(dirname {model}) /etc/systemd/system/llamaherd-server.service.d
touch {model}
ln -s paced /opt/llamaherd/server/current
cd /opt/llamaherd/server/paced
python3 -m venv --without-pip venv
echo {server} >venv/lib/python3.11/site-packages/server.pth
printf '[Service]\\nEnvironment=PYTHONPATH={server} WORKER_DOUBLE={server}/paced_worker.py {environment}\\n' \
  >/etc/systemd/system/llamaherd-server.service.d/paced.conf
"""


def served_by(fleet: Herd, since: int) -> dict[str, int]:
    """How often each host answered or failed a request, in the edge's log from line `since` on."""
    lines = fleet.sh("e1", f"tail -n +{since + 1} /var/log/nginx/access.log").splitlines()
    return {host: sum(f"{fleet.address(host)}:8443" in line for line in lines) for host in HOSTS}


def logged(fleet: Herd) -> int:
    return int(fleet.sh("e1", "cat /var/log/nginx/access.log | wc -l"))


def join(fleet: Herd) -> str:
    """Put f3 beside f1 and f2 in the inventory; returns the inventory's text from before."""
    return serving(fleet, HOSTS)


def serving(fleet: Herd, hosts: Sequence[str]) -> str:
    """Let these alone be the hosts for inference in the inventory; returns its text from before."""
    path = fleet.inventory / "hosts.yml"
    before = path.read_text()
    listed = "".join(f"        {host}:\n" for host in hosts)
    path.write_text(re.sub(r"(    inference:\n      hosts:\n)(        \w+:\n)+", rf"\g<1>{listed}", before))
    return before


@contextmanager
def cut_off(fleet: Herd, host: str) -> Iterator[None]:
    """While this lasts, nothing reaches `host`, and nobody was told."""
    port = ["ip", "link", "set", f"vb-{host}"]
    subprocess.run([*port, "down"], check=True)
    try:
        yield
    finally:
        subprocess.run([*port, "up"], check=True)


def completion(fleet: Herd, model: str = "chat", **more: object) -> Any:
    """What the edge answers to a chat that asks for two greedy tokens."""
    secrets = fleet.inventory / ".secrets"
    key = (secrets / "keys/default").read_text().strip()
    client = Client(f"https://{fleet.address('e1')}", str(secrets / "ca.crt"), key)
    ask = {"messages": [{"role": "user", "content": "Count from one to twenty, please."}], "max_tokens": 2}
    answer = client.request("POST", "/v1/chat/completions", {"model": model, "temperature": 0, **ask, **more})
    assert answer.status == 200, answer.body
    return answer.json()


def digest(model: Path) -> str:
    return hashlib.sha256(model.read_bytes()).hexdigest()


def asked(model: Path, name: str = "chat", **more: object) -> str:
    """Variables that put `model` under the name that clients know, and measure for seconds only."""
    entry = {"name": name, "sha256": digest(model), "source": {"kind": "file", "path": str(model)}}
    return json.dumps({"llamaherd_models": [entry]} | GATE | more)
