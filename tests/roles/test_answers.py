"""The gate on answers of an upgrade, as its tasks run against a real server on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.roles.conftest import play
from tests.server.conftest import Server, running

SUITE = ["Name the capital of France.", "Count to ten.", "Why is the sky blue?", "Write a line about llamas."]
MORE = ["Translate to German: good morning", "What is 12 + 30?", "List three fruits.", "Who wrote Hamlet?"]


def gate(folder: Path, server: Server, tasks: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """One of the role's lists of tasks, for a host that is this machine."""
    (folder / "secrets/keys").mkdir(parents=True, exist_ok=True)
    (folder / "secrets/keys/ops").write_text("none")
    (folder / "suite.yml").write_text(json.dumps({"prompts": SUITE + MORE}))
    variables = {
        "ansible_python_interpreter": sys.executable,
        "ansible_connection": "local",
        "llamaherd_service_manager": "none",
        "llamaherd_model": "smollm2",
        "llamaherd_keys": [{"name": "ops", "admin": True}],
        "llamaherd_secrets_dir": str(folder / "secrets"),
        "llamaherd_build_dir": str(folder / "build"),
        "llamaherd_server_port": int(server.url.rpartition(":")[2]),
        "llamaherd_upgrade_limits": ["kld=0.01"],
        "llamaherd_upgrade_suite": str(folder / "suite.yml"),
        "__upgrade_engine": {"json": {"state": "ready"}},
        **more,
    }
    inventory = {"inference": {"hosts": {"canary": variables}}, "edge": {"hosts": {"canary": None}}}
    (folder / "hosts.yml").write_text(yaml.safe_dump(inventory))
    role = {"ansible.builtin.include_role": {"name": "upgrade", "tasks_from": tasks}}
    (folder / "gate.yml").write_text(yaml.safe_dump([{"hosts": "inference", "gather_facts": False, "tasks": [role]}]))
    return play(folder, "-i", str(folder / "hosts.yml"), str(folder / "gate.yml"))


def test_a_canary_that_answers_otherwise_fails_and_one_that_does_not_goes_on(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        settings = httpx.get(f"{server.url}/admin/engine").json()["settings"]
        recorded = gate(tmp_path, server, "record_answers")
        assert recorded.returncode == 0, recorded.stdout + recorded.stderr
        assert (tmp_path / "build/upgrade/canary/answers.json").stat().st_mode & 0o77 == 0
        harmless = settings | {"parallel": 1, "batch": 128, "ubatch": 64}
        for change, code in ((harmless, 0), (settings | {"kv_type_k": "q4_0", "kv_type_v": "q4_0"}, 2)):
            httpx.put(f"{server.url}/admin/engine", json=change, timeout=60).raise_for_status()
            done = gate(tmp_path, server, "compare_answers")
            assert done.returncode == code, done.stdout + done.stderr
            assert "KL divergence" in done.stdout
    assert "limit kld=0.01 misses: KL divergence" in " ".join(done.stdout.split())
