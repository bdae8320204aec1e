"""Duration of plays on lab hosts that are already deployed: one host, four hosts, one changed setting.

The hosts are on a bridge of their own, each is its own edge, and they are removed at the end. The controller and all
hosts share this machine's cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from bench.frontend import bounded
from bench.lab_host import key, ssh
from bench.servers import WORK
from bench.serving import ROUNDS
from bench.table import Result
from demo.stages import playbook

HOSTS = {f"p{number}": f"198.18.4.1{number}" for number in range(1, 5)}
SETTINGS = {"parallel": 2, "ctx_per_slot": 1024}
BOUND_S, BOUND_FOUR, BOUND_SETTING_S = 25.0, 1.5, 15.0


# Polls the server until it has `parallel` slots.
WAIT = """python3 -c '
import json, time, urllib.request
request = urllib.request.Request("http://127.0.0.1:8080/slots", headers={{"Authorization": "Bearer {key}"}})
while True:
    try:
        if len(json.load(urllib.request.urlopen(request, timeout=1))) == {parallel}:
            break
    except OSError:
        pass
    time.sleep(0.2)
'"""


def run() -> Result:
    with hosts() as inventory:
        one, four, changed = [], [], []
        for _ in range(ROUNDS):
            one.append(deploy(inventory, "--limit=p1"))
            four.append(deploy(inventory))
            changed += [in_force_after(inventory, parallel) for parallel in (1, SETTINGS["parallel"])]
    return {
        "deploy": {
            "one_host_s": bounded([took for took, _ in one], BOUND_S),
            "four_hosts_s": bounded([took for took, _ in four], None),
            "four_to_one": bounded([all_[0] / single[0] for all_, single in zip(four, one, strict=True)], BOUND_FOUR),
            "one_host_cores": bounded([cores for _, cores in one], None),
            "four_hosts_cores": bounded([cores for _, cores in four], os.cpu_count()),
        },
        "setting": {"in_force_s": bounded(changed, BOUND_SETTING_S)},
    }


@contextmanager
def hosts() -> Iterator[Path]:
    """Yield the inventory of four deployed hosts."""
    inventory = WORK / "plays"
    inventory.mkdir(parents=True, exist_ok=True)
    (inventory / "hosts.yml").write_text(yaml.safe_dump(described()))
    try:
        playbook(str(inventory), "lab.yml")
        playbook(str(inventory), "deploy.yml")
        yield inventory
    finally:
        playbook(str(inventory), "lab.yml", "-e", "llamaherd_lab_state=absent")


def described() -> dict[str, Any]:
    secrets = "{{ inventory_dir }}/.secrets"
    reach = {
        "ansible_user": "root",
        "ansible_ssh_private_key_file": f"{secrets}/lab_ed25519",
        "ansible_ssh_common_args": f"-o UserKnownHostsFile={secrets}/known_hosts",
    }
    network = {
        "llamaherd_lab_bridge": "herd4",
        "llamaherd_lab_gateway": "198.18.4.1",
        "llamaherd_lab_network": "198.18.4.0/24",
        "llamaherd_lab_run_dir": "/run/llamaherd-lab4",
    }
    booted = {host: {"ansible_host": address, "llamaherd_lab_release": "bookworm"} for host, address in HOSTS.items()}
    named: dict[str, None] = dict.fromkeys(HOSTS)
    here = {"ansible_connection": "local", "ansible_python_interpreter": "{{ ansible_playbook_python }}"}
    groups = {
        "lab": {"hosts": booted, "vars": reach},
        "inference": {"hosts": named, "vars": {"llamaherd_settings": SETTINGS}},
        "edge": {"hosts": named},
        "loadgen": {"hosts": {"localhost": here}},
    }
    return {"all": {"children": groups, "vars": network}}


def deploy(inventory: Path, *arguments: str) -> tuple[float, float]:
    """Return the duration of a deploy in seconds and the average number of busy cores on this machine, proc_stat(5)."""
    began, idle = time.monotonic(), idle_s()
    playbook(str(inventory), "deploy.yml", *arguments)
    took = time.monotonic() - began
    return took, (os.cpu_count() or 1) - (idle_s() - idle) / took


def idle_s() -> float:
    """Return the idle time of all cores since boot in seconds, including time spent waiting for I/O."""
    idle, waiting = Path("/proc/stat").read_text().split()[4:6]
    return (int(idle) + int(waiting)) / os.sysconf("SC_CLK_TCK")


def in_force_after(inventory: Path, parallel: int) -> float:
    """Return the seconds from the start of the command until the first host's server has `parallel` slots."""
    wait = WAIT.format(key=key(inventory), parallel=parallel)
    settings = json.dumps({"llamaherd_settings": SETTINGS | {"parallel": parallel}})
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        play = pool.submit(playbook, str(inventory), "deploy.yml", "--limit=p1", "--tags=config", "-e", settings)
        subprocess.run([*ssh(inventory, HOSTS["p1"]), wait], check=True, timeout=120)
        after = time.monotonic() - began
        play.result()
    return after
