"""What playbooks/upgrade.yml relies on in Ansible: how a batch in which one host failed ends a rollout, and how not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
# Hosts a, b, c, d in batches of one, two and one; the switch fails on b.
PLAY = """
- hosts: all
  serial: [1, 2, 1]
  order: inventory
  gather_facts: false
  {play}
  tasks:
    - name: Upgrade
      block:
        - ansible.builtin.assert:
            that: inventory_hostname != 'b'
      rescue:
        - ansible.builtin.set_fact:
            went_back: "{{{{ inventory_hostname }}}}"
        - ansible.builtin.debug:
            msg: back {{{{ inventory_hostname }}}}
        {rescue}
      {always}
    - ansible.builtin.debug:
        msg: in service {{{{ inventory_hostname }}}}
    - ansible.builtin.assert:
        that: went_back is not defined or {forgiven}
"""
FAIL = "- ansible.builtin.fail:"
ALWAYS = "always: [ansible.builtin.meta: noop]"


def rollout(folder: Path, play: str, rescue: str = "", always: str = "", *, forgiven: bool = False) -> tuple[int, str]:
    (folder / "play.yml").write_text(PLAY.format(play=play, rescue=rescue, always=always, forgiven=forgiven))
    command = [str(BIN / "ansible-playbook"), "-i", "a,b,c,d,", "-c", "local", str(folder / "play.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    return done.returncode, done.stdout


def test_a_host_that_went_back_serves_and_stops_the_rollout(tmp_path: Path) -> None:
    rc, said = rollout(tmp_path, "max_fail_percentage: 0")
    assert rc != 0
    assert [f"in service {host}" in said for host in "abcd"] == [True, True, True, False]
    assert [f"back {host}" in said for host in "abcd"] == [False, True, False, False]


def test_a_rescue_that_does_not_fail_again_would_let_the_rollout_go_on(tmp_path: Path) -> None:
    rc, said = rollout(tmp_path, "max_fail_percentage: 0", forgiven=True)
    assert rc == 0
    assert "in service d" in said


@pytest.mark.parametrize(("rescue", "always", "goes_on"), [(FAIL, "", False), (FAIL, ALWAYS, True)])
def test_with_always_the_next_batch_would_begin(tmp_path: Path, rescue: str, always: str, goes_on: bool) -> None:
    _, said = rollout(tmp_path, "max_fail_percentage: 0", rescue, always)
    assert ("in service d" in said) is goes_on


def test_any_errors_fatal_would_send_a_healthy_host_back(tmp_path: Path) -> None:
    rc, said = rollout(tmp_path, "any_errors_fatal: true", FAIL)
    assert rc != 0
    assert "back c" in said
    assert "in service d" not in said
