"""An edge before hosts that serve other models: f1 and f2 have `chat`, f3 has `code`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
import yaml

from tests.lab.conftest import Herd
from tests.lab.fleet import GATE, completion, join, logged, served_by
from tests.lab.load import streaming
from tests.verify.client import Client

pytestmark = [pytest.mark.lab, pytest.mark.fleet, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def unlike(fleet: Herd) -> Iterator[Herd]:
    """The same file under another name on f3, which joins the fleet."""
    variables = yaml.safe_load((fleet.inventory / "hosts.yml").read_text())["all"]["vars"]
    models = [{**variables["llamaherd_models"][0], "name": "code", "aliases": ["coder"]}]
    own = fleet.inventory / "host_vars/f3/unlike.yml"
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text(json.dumps({"llamaherd_model": "code", "llamaherd_models": models}))
    before = join(fleet)
    try:
        fleet.succeed("deploy.yml")
        yield fleet
    finally:
        own.unlink()
        (fleet.inventory / "hosts.yml").write_text(before)
        fleet.succeed("deploy.yml")


def client(fleet: Herd) -> Client:
    secrets = fleet.inventory / ".secrets"
    key = (secrets / "keys/default").read_text().strip()
    return Client(f"https://{fleet.address('e1')}", str(secrets / "ca.crt"), key)


def test_every_host_is_as_its_inventory_promises(unlike: Herd) -> None:
    unlike.succeed("verify.yml")


@pytest.mark.parametrize(("name", "hosts"), [("chat", {"f1", "f2"}), ("code", {"f3"}), ("coder", {"f3"})])
def test_a_request_reaches_hosts_of_its_model_alone(unlike: Herd, name: str, hosts: set[str]) -> None:
    before = logged(unlike)
    for _ in range(4):
        completion(unlike, name)
    counts = served_by(unlike, before)
    assert sum(counts[host] for host in hosts) == 4
    assert sum(counts.values()) == 4


def test_all_models_are_listed_and_an_unknown_one_names_them(unlike: Herd) -> None:
    listed = client(unlike).request("GET", "/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["chat", "code"]
    asked = {"model": "gpt-4", "messages": [{"role": "user", "content": "Hello."}]}
    answer = client(unlike).request("POST", "/v1/chat/completions", asked)
    assert (answer.status, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert answer.json()["error"]["message"].endswith("available: 'chat', 'code'")


def test_status_has_a_row_for_each_model(unlike: Herd) -> None:
    shown = unlike.succeed("status.yml").output
    assert re.search(r"\n +model\s+hosts\s+up\s+slots\s+queue\n", shown)
    assert re.search(r"\n +chat\s+f1, f2\s+2/2\s+\d/4\s+\d+\n", shown)
    assert re.search(r"\n +code\s+f3\s+1/1\s+\d/2\s+\d+\n", shown)


def test_a_rollout_takes_no_model_away(unlike: Herd) -> None:
    """The command asks for three at once; nobody stands in for f3, which serves on from beside or holds requests."""
    changed = {"llamaherd_settings": {"parallel": 2, "ctx_per_slot": 512, "threads": 1, "threads_batch": 1}}
    with streaming(unlike, rate=0.5) as load:
        unlike.succeed("upgrade.yml", "-e", json.dumps(changed | GATE | {"llamaherd_upgrade_serial": [3]}))
    assert load.failures == []
    assert load.outcomes["ok"] >= 10
    assert " down;" not in unlike.sh("e1", "cat /etc/nginx/nginx.conf")
    completion(unlike, "code")


def test_two_meanings_of_an_alias_are_refused_before_anything_changes(unlike: Herd) -> None:
    own = unlike.inventory / "host_vars/f3/unlike.yml"
    before = own.read_text()
    models = json.loads(before)["llamaherd_models"]
    models[0] |= {"aliases": ["chat"], "sha256": "0" * 64}
    own.write_text(json.dumps({"llamaherd_model": "code", "llamaherd_models": models}))
    try:
        run = unlike.play("deploy.yml", "--tags", "nginx")
    finally:
        own.write_text(before)
    assert run.rc != 0
    assert (
        "the alias 'chat' means different models: chat on f1, chat on f2 (sha256 b179c9523d0e); code on f3"
        in run.output
    )
