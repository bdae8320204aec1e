"""A host whose engine is llama-server, and then beside it a second model, and then a second instance."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.lab.conftest import Herd
from tests.verify.client import Client

pytestmark = [
    pytest.mark.lab,
    pytest.mark.timeout(3600),
    pytest.mark.parametrize("herd", ["trixie"], indirect=True),  # test_spine.py has the other Debian
]

NATIVE = {"llamaherd_engine": "llama-server"}


def variables(**values: Any) -> tuple[str, str]:
    return "-e", json.dumps(values)


def client(herd: Herd) -> Client:
    secrets = herd.inventory / ".secrets"
    return Client(
        f"https://{herd.address('t1')}", str(secrets / "ca.crt"), (secrets / "keys/default").read_text().strip()
    )


def programs(herd: Herd) -> list[str]:
    """What the server's user runs."""
    mine = '[ "$(stat -c %U $one)" != llamaherd ] || { tr "\\0" " " <$one/cmdline; echo; }'
    return herd.sh("t1", f"for one in /proc/[0-9]*; do {mine}; done").splitlines()


def test_deploy_with_the_engine_llama_server(herd: Herd) -> None:
    herd.succeed("deploy.yml", *variables(**NATIVE))
    assert any("/bin/llama-server" in line for line in programs(herd))
    assert not any("llamaherd_server.worker" in line for line in programs(herd))


def test_a_second_deploy_changes_nothing(herd: Herd) -> None:
    assert herd.succeed("deploy.yml", *variables(**NATIVE)).changed["t1"] == 0


def test_verify(herd: Herd) -> None:
    herd.succeed("verify.yml", *variables(**NATIVE))


def test_it_answers_through_nginx(herd: Herd) -> None:
    body = {"prompt": "1, 2, 3, 4,", "max_tokens": 4, "temperature": 0}
    answer = client(herd).request("POST", "/v1/completions", body)
    assert answer.status == 200, answer.body
    assert "5" in answer.json()["choices"][0]["text"]


def test_a_changed_setting_restarts_it(herd: Herd) -> None:
    before = herd.sh("t1", "systemctl show -P InvocationID nginx llamaherd-server").split()
    herd.succeed("deploy.yml", "--tags", "config", *variables(**NATIVE, llamaherd_settings={"parallel": 3}))
    after = herd.sh("t1", "systemctl show -P InvocationID nginx llamaherd-server").split()
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False]
    assert any("--parallel 3 " in line for line in programs(herd))


def test_a_setting_that_the_server_refuses_leaves_the_old_ones(herd: Herd) -> None:
    before = herd.sh("t1", "cat /etc/llamaherd/server.toml")
    run = herd.play("deploy.yml", "--tags", "config", *variables(**NATIVE, llamaherd_server_limits={"max_queue": 0}))
    assert run.rc != 0
    assert "limits.max_queue: Input should be greater than or equal to 1" in run.output
    assert herd.sh("t1", "cat /etc/llamaherd/server.toml") == before
    assert herd.sh("t1", "systemctl is-active llamaherd-server") == "active\n"
