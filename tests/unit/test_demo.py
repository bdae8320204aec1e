"""What `make demo` keeps apart, gives back and reports; tests/lab/test_demo.py runs it as a whole."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from demo import claims, process, tuning
from demo.jobs import end_jobs
from demo.load import engine_variables
from demo.stages import StageFailed, reason
from tests.unit.conftest import ROOT

PLAYBOOK = """
- hosts: localhost
  gather_facts: false
  vars: {ansible_python_interpreter: "{{ ansible_playbook_python }}"}
  tasks:
    - name: The failing task
      ansible.builtin."""


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("fail: {msg: disk is full}", ["disk is full"]),
        (
            "shell: 'echo first >&2; echo second >&2; exit 3'",
            ["The failing task: ", "non-zero return code", "first", "second"],
        ),
        ("shell: 'echo code {{ item }} >&2; exit {{ item }}'\n      loop: [0, 2]", ["code 2"]),
        ("debug: {msg: '{{ nothing.at_all }}'}", ["'nothing' is undefined"]),
        ("comand: 'true'", ["ansible.builtin.comand"]),
    ],
    ids=["message", "stderr", "loop", "template", "syntax"],
)
def test_the_reason_of_a_failed_playbook_is_whole(tmp_path: Path, task: str, expected: list[str]) -> None:
    play = tmp_path / "play.yml"
    play.write_text(PLAYBOOK + task)
    command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "localhost,", "-c", "local", str(play)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    found = reason((done.stdout + done.stderr).splitlines())
    assert [line for line in expected if line not in found] == []


def test_output_without_a_failed_task_gives_its_last_lines() -> None:
    assert reason(["ERROR: no locale", ""]) == "ERROR: no locale"


def test_two_demos_get_two_ports_and_a_foreign_one_is_left_alone() -> None:
    with process.held_port() as first, process.held_port() as second:
        assert first != second
        for port in (first, second):
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                other.bind(("127.0.0.1", port))
    with socket.create_server(("127.0.0.1", first)), process.held_port() as third:
        assert third != first


def test_a_second_demo_in_a_checkout_is_refused() -> None:
    refused = pytest.raises(StageFailed, match=rf"process {os.getpid()}\).*make demo-down")
    with claims.checkout(), refused, claims.checkout():
        pytest.fail("two demos in one checkout")
    with claims.checkout():
        pass


def test_a_lab_host_of_another_checkout_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As long as its demo runs; one that was killed, or whose checkout is gone, owns nothing."""
    other = tmp_path / "other"
    owner = tmp_path / "owner"
    owner.write_text(str(other))
    monkeypatch.setattr(claims, "_LAB_OWNER", owner)
    monkeypatch.setattr(claims, "_LAB", tmp_path / "lab")
    monkeypatch.setattr(claims, "_LAB_RUN", tmp_path / "run")
    assert not claims.lab_is_ours()
    (tmp_path / "lab/hosts/herd1").mkdir(parents=True)
    (other / "build/demo").mkdir(parents=True)
    with monkeypatch.context() as there:
        there.setattr(claims, "ROOT", other)
        with claims.checkout():
            there.undo()
            assert not claims.lab_is_ours()
            assert f"belongs to the demo in {other}" in capsys.readouterr().out


def test_an_interrupted_build_ends_with_all_that_it_started(tmp_path: Path) -> None:
    log = tmp_path / "a build/build.log"
    log.parent.mkdir()
    job = f"sleep 1000 & echo $!; wait; : {shlex.quote(str(log))}"
    shell = subprocess.Popen(["sh", "-c", job, str(log)], stdout=subprocess.PIPE, text=True)
    assert shell.stdout is not None
    child = int(shell.stdout.readline())
    Path(f"{log}.pid").write_text(f"{shell.pid}\n")
    (tmp_path / "other.log.pid").write_text(f"{os.getpid()}\n")
    end_jobs(tmp_path)
    assert shell.wait(10) != 0
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"budget.json": {"needed_s": 421.5, "budget_s": 180}}, 422),
        ({"verdict.json": {"table": [{"output_tokens_per_s": None}], "provenance": {"budget_s": 100}}}, 400),
        ({"verdict.json": {"table": [{"output_tokens_per_s": None}, {"output_tokens_per_s": 12.5}]}}, 0),
    ],
    ids=["too small", "nothing measured", "measured"],
)
def test_a_budget_that_gives_no_choice_is_extended(
    tmp_path: Path, files: dict[str, dict[str, object]], expected: int
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert tuning.longer_budget_s(tmp_path) == expected


def test_on_a_busy_machine_the_engine_gets_one_thread() -> None:
    """Threads that wait for each other there take seconds a token."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        _, variables = engine_variables()
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    assert json.loads(variables) == {"llamaherd_settings": {"threads": 1, "threads_batch": 1}}
