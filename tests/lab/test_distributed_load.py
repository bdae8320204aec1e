"""Load from hosts of group loadgen: the same requests as from the controller alone, and nothing stays behind."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from llamaherd_loadtest.samples import read_samples
from tests.lab.conftest import LEFT, ROOT, Herd, booted

pytestmark = [pytest.mark.lab, pytest.mark.fleet, pytest.mark.timeout(3600)]
WORKERS = ("f2", "f3")
RUN = (
    "-e",
    json.dumps(
        {
            **{"llamaherd_loadgen_users": 4, "llamaherd_loadgen_requests": 24, "llamaherd_loadgen_seed": 7},
            "llamaherd_loadgen_duration": "300s",
        }
    ),
)
CONTROLLER = """        localhost:
          ansible_connection: local
          ansible_python_interpreter: "{{ ansible_playbook_python }}"
"""
# The lab's own plays need this machine by name.
ON_WORKERS = f"        f2:\n        f3:\n    controller:\n      hosts:\n{CONTROLLER}"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Herd]:
    """e1 before f1, deployed; f2 and f3, of two releases of Debian, are there to load them."""
    serving = ("        f1:\n        f2:\n      vars:\n", "        f1:\n      vars:\n")
    with booted(tmp_path_factory.mktemp("inventory"), serving, (CONTROLLER, ON_WORKERS)) as herd:
        herd.succeed("deploy.yml")
        yield herd


def requests_of(herd: Herd) -> list[tuple[int, int | None]]:
    """Number and prompt tokens of each counted request of a run."""
    herd.succeed("loadtest.yml", *RUN)
    results = ROOT / "build/loadtest/f1"
    summary = json.loads((results / "summary.json").read_text())
    assert (summary["fault"], summary["errors"]) == ("", {})
    return sorted((s.index, s.prompt_tokens) for s in read_samples(results / "samples.jsonl") if not s.warmup)


def test_workers_send_what_the_controller_alone_does(loaded: Herd) -> None:
    together = requests_of(loaded)
    assert [index for index, _ in together] == list(range(24))
    log = [json.loads(line) for line in loaded.sh("e1", "cat /var/log/nginx/access.log").splitlines()]
    chats = {line["client"] for line in log if line["request"] == "POST /v1/chat/completions"}
    assert {loaded.address(worker) for worker in WORKERS} <= chats
    hosts = loaded.inventory / "hosts.yml"
    distributed = hosts.read_text()
    hosts.write_text(distributed.replace(ON_WORKERS, CONTROLLER))
    try:
        assert requests_of(loaded) == together
    finally:
        hosts.write_text(distributed)


def test_a_run_leaves_no_key_and_no_process_and_installs_once(loaded: Herd) -> None:
    again = loaded.succeed("loadtest.yml", *RUN)
    for worker in WORKERS:
        assert again.changed[worker] == 0
        assert loaded.sh(worker, "ls -A /opt/llamaherd/loadgen/run; pgrep locust || true") == ""


def test_workers_that_were_not_prepared_are_named(loaded: Herd) -> None:
    run = loaded.play("loadtest.yml", "--limit", "f1", *RUN)
    assert run.rc != 0
    assert "f2, f3 of group loadgen cannot load f1: not all of them were prepared" in run.output


def test_a_worker_whose_sshd_forwards_nothing_is_one_line(loaded: Herd) -> None:
    switch = "/etc/ssh/sshd_config.d/no-forwarding.conf"
    loaded.sh("f2", f"echo AllowTcpForwarding no >{switch}; systemctl reload ssh")
    try:
        run = loaded.play("loadtest.yml", *RUN)
    finally:
        loaded.sh("f2", f"rm {switch}; systemctl reload ssh")
    assert "f2 cannot be a worker: Error: remote port forwarding failed" in run.output


def test_reset_removes_the_workers_too(loaded: Herd) -> None:
    loaded.succeed("reset.yml", "-e", "skip_confirmation=true")
    for worker in WORKERS:
        assert loaded.sh(worker, LEFT) == ""
