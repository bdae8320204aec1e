"""The fleet's quickstart as its reader types it: the page's inventory, four hosts, a user with sudo's password."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator

import pytest
import yaml

from tests.lab.conftest import BIN, ROOT, Herd, booted

pytestmark = [pytest.mark.lab, pytest.mark.fleet, pytest.mark.timeout(3600)]
PAGE = (ROOT / "docs/quickstart-fleet.md").read_text()
NAMES = {"edge.internal": "e1", "gpu1.internal": "f1", "gpu2.internal": "f2", "gpu3.internal": "f3"}
PREPARE = """set -e
useradd --create-home --shell /bin/bash --groups sudo ops
echo ops:secret | chpasswd
install -d -m 700 -o ops ~ops/.ssh
install -m 600 -o ops ~/.ssh/authorized_keys ~ops/.ssh/authorized_keys
"""


class Reader:
    """Who types the page's commands, one shell for each block, from its inventory in the place of inventories/mine."""

    def __init__(self, herd: Herd) -> None:
        secrets, folder = herd.inventory / ".secrets", herd.inventory.parent
        password = folder / "password"
        password.write_text("secret")
        self.inventory = folder / "mine"
        self.environment = {  # -K would ask
            "ANSIBLE_BECOME_PASSWORD_FILE": str(password),
            "ANSIBLE_PRIVATE_KEY_FILE": str(secrets / "lab_ed25519"),
            "ANSIBLE_SSH_COMMON_ARGS": f"-o UserKnownHostsFile={secrets / 'known_hosts'}",
        }

    def types(self, commands: str, budget: str = "60s") -> str:
        """playbooks/tune.yml takes no longer than it must: as long as it asks for, where that is too short."""
        commands = re.sub(r"tune\.yml( -e \S+budget=\S+)?", f"tune.yml -e llamaherd_loadgen_budget={budget}", commands)
        commands = (
            commands.replace(" -K ", " ")
            .replace("inventories/mine", str(self.inventory))
            .replace(". .venv", f". {BIN.parent}")
        )
        exports = "".join(f"export {name}='{value}'\n" for name, value in self.environment.items())
        done = subprocess.run(
            ["bash", "-ec", exports + commands], cwd=ROOT, capture_output=True, text=True, check=False
        )
        print(done.stdout[-20_000:], done.stderr[-5_000:])
        asked = re.search(r"too small to compare settings: .*give --budget (\d+s)", done.stdout)
        if done.returncode and asked:
            return self.types(commands, asked[1])
        assert done.returncode == 0
        return done.stdout


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    with booted(tmp_path_factory.mktemp("fleet"), ("trixie", "bookworm")) as herd:
        for host in NAMES.values():
            herd.sh(host, PREPARE)
        [described] = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
        mine, lab = yaml.safe_load(described), yaml.safe_load((herd.inventory / "hosts.yml").read_text())
        mine["all"]["vars"]["llamaherd_models"] = lab["all"]["vars"]["llamaherd_models"]
        reader = Reader(herd)
        for name, host in NAMES.items():  # in the place of a name server
            variables = reader.inventory / "host_vars" / name / "address.yml"
            variables.parent.mkdir(parents=True)
            variables.write_text(yaml.safe_dump({"ansible_host": herd.address(host)}))
        (reader.inventory / "hosts.yml").write_text(yaml.safe_dump(mine))
        yield reader


def test_it_serves_under_the_name_that_clients_know(reader: Reader) -> None:
    typed, _ = re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    said = reader.types(typed)
    assert all(re.search(rf"\n +{name}\s+ready\s.*\bchat\b", said) for name in NAMES if name != "edge.internal")
    secrets = reader.inventory / ".secrets"
    key = (secrets / "keys/default").read_text().strip()
    ask = ["curl", "-sSf", "--cacert", str(secrets / "ca.crt"), "--resolve", "llm.internal:443:198.18.6.10"]
    ask += ["-H", f"Authorization: Bearer {key}", "https://llm.internal/v1/models"]
    models = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    assert json.loads(models)["data"][0]["id"] == "chat"
