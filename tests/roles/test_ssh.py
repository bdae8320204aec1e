"""ssh that the roles call themselves, for tunnels and testinfra, goes by what Ansible's own goes by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.roles.conftest import ROOT, play

TOLD = ("--user=ops", "--private-key=/told", "--ssh-common-args=-o ProxyJump=door")


@pytest.mark.parametrize(
    ("variables", "arguments", "goes_by"),
    [
        ({}, (), ["", "", []]),
        ({}, TOLD, ["ops", "/told", ["-o", "ProxyJump=door"]]),
        (
            {"ansible_user": "me", "ansible_ssh_private_key_file": "/mine", "ansible_ssh_extra_args": "-4"},
            TOLD,
            ["me", "/mine", ["-o", "ProxyJump=door", "-4"]],
        ),
    ],
    ids=["nothing", "the command line", "the host's variables first"],
)
def test_it_goes_by_what_ansible_was_told(
    tmp_path: Path, variables: dict[str, str], arguments: tuple[str, ...], goes_by: list[Any]
) -> None:
    out = tmp_path / "told.json"
    told = "{{ [_common_ssh_user, _common_ssh_key, _common_ssh_args.split()] | to_json }}"
    write = {"ansible.builtin.command": {"argv": ["tee", str(out)], "stdin": told}, "delegate_to": "localhost"}
    tasks = {"hosts": "all", "gather_facts": False, "tasks": [write]}
    playbook, inventory = tmp_path / "play.yml", tmp_path / "hosts.yml"
    playbook.write_text(yaml.safe_dump([tasks | {"vars_files": [str(ROOT / "roles/common/vars/main.yml")]}]))
    inventory.write_text(yaml.safe_dump({"all": {"hosts": {"far": variables}}}))
    run = play(tmp_path, "-i", str(inventory), *arguments, str(playbook))
    assert run.returncode == 0, run.stdout + run.stderr
    assert json.loads(out.read_text()) == goes_by
