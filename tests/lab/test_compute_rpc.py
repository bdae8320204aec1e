"""A model whose layers lie on another host: llama-server before a worker as a unit, over the lab's network."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.lab.conftest import Herd, booted
from tests.lab.fleet import completion

pytestmark = [pytest.mark.lab, pytest.mark.fleet, pytest.mark.timeout(3600)]
GROUPS = ("        f1:\n        f2:\n", "        f1:\n    rpc:\n      hosts:\n        f3:\n    nobody:\n      hosts:\n")
# Without unified control groups, systemd lets everyone in; it says so in its log.
FIREWALL = (
    "          ansible_host: 198.18.6.13\n",
    "          ansible_host: 198.18.6.13\n          llamaherd_lab_containers: true\n",
)
OWN = {
    "f1": {"llamaherd_engine": "llama-server", "llamaherd_rpc_workers": ["f3"], "llamaherd_rpc_address": "198.18.6.11"},
    "f3": {"llamaherd_rpc_address": "198.18.6.13"},
}
RESIDENT = "grep VmRSS /proc/$(systemctl show -P MainPID llamaherd-rpc)/status"
REACHED = "import socket; socket.create_connection(('198.18.6.13', 50052), 3)"


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Herd]:
    """e1 before f1, whose model lies on f3."""
    with booted(tmp_path_factory.mktemp("inventory"), GROUPS, FIREWALL) as herd:
        for host, variables in OWN.items():
            path = herd.inventory / f"host_vars/{host}.yml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(variables))
        herd.succeed("deploy.yml")
        yield herd


def test_the_worker_holds_the_weights(spread: Herd) -> None:
    assert completion(spread)["choices"][0]["message"]["content"]
    size = int(spread.sh("f1", "stat -Lc %s /var/lib/llamaherd/models/chat.gguf"))
    assert int(spread.sh("f3", RESIDENT).split()[1]) * 1024 > size / 2


def test_a_second_deploy_changes_nothing(spread: Herd) -> None:
    assert set(spread.succeed("deploy.yml").changed.values()) == {0}


def test_nobody_but_the_host_that_names_it_reaches_the_worker(spread: Herd) -> None:
    assert spread.sh("f1", f'python3 -c "{REACHED}" && echo reached') == "reached\n"
    assert spread.sh("e1", f'python3 -c "{REACHED}" 2>&- || echo refused') == "refused\n"


def test_both_come_back_when_the_worker_dies(spread: Herd) -> None:
    spread.sh("f3", "systemctl kill --signal=KILL llamaherd-rpc")
    spread.sh("f3", "until systemctl is-active -q llamaherd-rpc; do sleep 0.2; done")
    with pytest.raises(AssertionError, match="engine_crashed"):  # llama-server looks for its worker when it computes
        completion(spread)
    ready = "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/readyz')"
    spread.sh("f1", f'sleep 2; until python3 -c "{ready}" 2>&-; do sleep 0.5; done')
    assert completion(spread)["choices"][0]["message"]["content"]
