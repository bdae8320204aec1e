"""The laptop's quickstart as its reader types it: a user with sudo's password, on a host that is its own controller."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator

import pytest

from tests.lab.conftest import CACHE, LEFT, ROOT, Herd
from tests.tree import tracked

pytestmark = [pytest.mark.lab, pytest.mark.fleet, pytest.mark.timeout(3600)]
PAGE = (ROOT / "docs/quickstart-laptop.md").read_text().partition("## Keep it")[2]
# What a laptop has. Only root's bootstrap installs python3-venv by itself.
PREPARE = """set -e
apt-get update -qq && apt-get install -y -qq --no-install-recommends curl python3-venv >/dev/null
useradd --create-home --shell /bin/bash --groups sudo me
echo me:secret | chpasswd
install -m 600 -o me /dev/stdin ~me/.sudo <<<secret
runuser -u me -- tar -C ~me -xf /var/cache/llamaherd/checkout.tar
"""
# Where this machine's certificates are trusted, lab hosts trust them too.
ENVIRONMENT = "ANSIBLE_BECOME_PASSWORD_FILE=~/.sudo SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt"


class Reader:
    """Who types the page's commands, one shell for each block."""

    def __init__(self, herd: Herd) -> None:
        self.herd = herd

    def types(self, commands: str) -> str:
        """-K would ask for the password; playbooks/tune.yml takes no longer than it must."""
        commands = commands.replace(" -K ", " ").replace("tune.yml", "tune.yml -e llamaherd_loadgen_budget=60s")
        script = f"cd ~/llamaherd && export {ENVIRONMENT} && set -e\n{commands}"
        return self.herd.sh("t1", f"runuser -l me -c 'bash -s' <<'TYPED'\n{script}\nTYPED", timeout_s=3000)


@pytest.fixture(scope="module")
def reader(herd: Herd) -> Iterator[Reader]:
    archive = CACHE / "checkout.tar"
    names = b"\0".join(bytes(path) for path in tracked())
    pack = ["tar", "--null", "--files-from=-", "--transform=s,^,llamaherd/,S", "--create", f"--file={archive}"]
    subprocess.run(pack, cwd=ROOT, input=names, check=True)
    archive.chmod(0o644)
    herd.sh("t1", PREPARE)
    archive.unlink()
    yield Reader(herd)


def test_it_serves_what_was_tuned(reader: Reader) -> None:
    [typed, *_] = re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    said = reader.types(typed)
    assert json.loads(said.splitlines()[-1])["data"][0]["id"] == "smollm2-135m-instruct"


def test_it_goes_without_a_trace(reader: Reader) -> None:
    [reset] = re.findall(r"`(ansible-playbook [^`]*reset\.yml)`", PAGE)
    reader.types(f". .venv/bin/activate\n{reset} -e skip_confirmation=true")
    assert reader.herd.sh("t1", LEFT).strip() == ""
