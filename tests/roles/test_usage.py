"""playbooks/usage.yml, for hosts that are real servers on this machine."""

from __future__ import annotations

import csv
import hashlib
import subprocess
import sys
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.roles.conftest import play
from tests.server.conftest import Server, free_port, paced, running


def serving(folder: Path) -> Any:
    """A server with the keys of the inventory, over a paced worker."""
    folder.mkdir()
    tables = [
        f'[[keys]]\nname = "{name}"\nsha256 = "{hashlib.sha256(name.encode()).hexdigest()}"\nadmin = {admin}\n'
        for name, admin in (("team", "false"), ("ops", "true"))
    ]
    (folder / "keys.toml").write_text("".join(tables))
    return running(folder, paced(step_ms=1), auth={"keys_file": str(folder / "keys.toml")})


def asked(server: Server, key: str, count: int) -> None:
    for _ in range(count):
        body = {"prompt": "x", "max_tokens": 5}
        reply = httpx.post(f"{server.url}/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
        assert reply.status_code == 200


def usage(folder: Path, ports: dict[str, int], **more: Any) -> subprocess.CompletedProcess[str]:
    (folder / "secrets/keys").mkdir(parents=True, exist_ok=True)
    (folder / "secrets/keys/ops").write_text("ops")
    variables = {
        "ansible_python_interpreter": sys.executable,
        "ansible_connection": "local",
        "ansible_become": False,
        "llamaherd_service_manager": "none",
        "llamaherd_keys": [{"name": "ops", "admin": True}],
        "llamaherd_secrets_dir": str(folder / "secrets"),
        "llamaherd_build_dir": str(folder / "build"),
        **more,
    }
    hosts = {name: {"llamaherd_server_port": port} for name, port in ports.items()}
    (folder / "hosts.yml").write_text(yaml.safe_dump({"inference": {"hosts": hosts, "vars": variables}}))
    return play(folder, "-i", str(folder / "hosts.yml"), "playbooks/usage.yml")


def test_usage_is_summed_over_hosts_and_one_that_is_down_is_named(tmp_path: Path) -> None:
    month = datetime.now(UTC).strftime("%Y-%m")
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(tmp_path / name)) for name in ("h1", "h2")]
        asked(servers[0], "team", 2)
        asked(servers[1], "team", 3)
        asked(servers[1], "ops", 1)
        ports = {name: int(one.url.rpartition(":")[2]) for name, one in zip(("h1", "h2"), servers, strict=True)}
        done = usage(tmp_path, ports)
        assert done.returncode == 0, done.stdout + done.stderr
        path = tmp_path / "build/usage/usage.csv"
        rows = [*csv.DictReader(path.read_text().splitlines())]
        assert [(one["month"], one["api_key_id"], one["num_model_requests"], one["output_tokens"]) for one in rows] == [
            (month, "ops", "1", "5"),
            (month, "team", "5", "25"),
        ]
        assert f"{month}  team" in done.stdout
        assert "changed=0" not in done.stdout.split("PLAY RECAP")[1].splitlines()[1]
        none = usage(tmp_path, ports, llamaherd_usage_from="2999-01-01")
        assert none.returncode == 0, none.stdout + none.stderr
        assert path.read_text().splitlines() == [",".join(rows[0])]
        without = usage(tmp_path, ports | {"h3": free_port()})
        assert without.returncode == 2
        assert "these sums are without h3" in " ".join(without.stdout.split())
        assert len(path.read_text().splitlines()) == 3
        refused = usage(tmp_path, ports, llamaherd_usage_from="2026-02-30")
        assert (refused.returncode, "day is out of range" in refused.stdout) == (2, True)


def test_bad_days_and_a_missing_admin_key_are_refused_before_a_host_is_asked(tmp_path: Path) -> None:
    ports = {"h1": free_port()}
    for name in ("llamaherd_usage_from", "llamaherd_usage_to"):
        done = usage(tmp_path, ports, **{name: "January"})
        assert done.returncode == 2
        assert f"{name} is 'January': write a day in UTC as in 2026-01-31" in " ".join(done.stdout.split())
    done = usage(tmp_path, ports, llamaherd_keys=[{"name": "ops"}])
    assert "llamaherd_keys has no key with `admin: true`" in " ".join(done.stdout.split())
