"""Servers on a lab host, reached through a tunnel: the deployed one, or llama-server in its place."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.servers import Running, free_port, process
from demo.stages import ROOT, playbook

INVENTORY = ROOT / "inventories/lab"
HOST = "herd1"
MODEL = "smollm2-135m-instruct"
ADDRESS = "198.18.0.11"
_SERVICE, _OTHER = "llamaherd-server", "bench-llama-server"


@dataclass(frozen=True)
class OnHost(Running):
    """A server on the host; `pid` is that of the host."""

    @property
    def rss_mib(self) -> float:
        return sum(map(int, sh(f"ps -o rss= -p {self.pid} --ppid {self.pid}").split())) / 1024


def key(inventory: Path) -> str:
    return (inventory / ".secrets/keys/default").read_text().strip()


def ssh(inventory: Path, address: str, *options: str) -> list[str]:
    """Return the ssh command for a lab host, to which the remote command is appended."""
    secrets = inventory / ".secrets"
    known = ["-i", str(secrets / "lab_ed25519"), "-o", f"UserKnownHostsFile={secrets / 'known_hosts'}"]
    return ["ssh", *known, *options, f"root@{address}"]


@contextmanager
def deployed(*arguments: str) -> Iterator[Running]:
    """Restart our service with the settings of `deploy.yml --tags config` and `arguments`."""
    playbook(str(INVENTORY), "deploy.yml", "--tags", "config", *arguments)
    sh(f"systemctl restart {_SERVICE}")
    with _tunnel(8080, "/readyz") as tunnel:
        yield OnHost(tunnel.port, _pid(_SERVICE))


@contextmanager
def llama_server() -> Iterator[Running]:
    """Run llama-server of the same build with the same model and its own defaults, while our service is stopped."""
    sh(f"systemctl stop {_SERVICE}")
    program = f"/opt/llamaherd/llama.cpp/current/bin/llama-server --model /var/lib/llamaherd/models/{MODEL}.gguf"
    sh(f"systemd-run --quiet --collect --unit={_OTHER} {program} --alias {MODEL} --port 8081")
    try:
        with _tunnel(8081, "/health") as tunnel:
            yield OnHost(tunnel.port, _pid(_OTHER))
    finally:
        sh(f"systemctl stop {_OTHER}; systemctl start {_SERVICE}")


def sh(command: str) -> str:
    return subprocess.run([*ssh(INVENTORY, ADDRESS), command], check=True, capture_output=True, text=True).stdout


def _pid(unit: str) -> int:
    return int(sh(f"systemctl show --property=MainPID --value {unit}"))


def _tunnel(port: int, health: str) -> AbstractContextManager[Running]:
    """Open a tunnel that is ready when the host's `port` is; its `pid` is the tunnel's own."""
    here = free_port()
    return process(ssh(INVENTORY, ADDRESS, "-N", "-L", f"127.0.0.1:{here}:127.0.0.1:{port}"), here, health)
