"""Real hosts for the tests: an inventory of their own, booted before the first test and removed after the last."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
CACHE = Path.home() / ".cache/llamaherd/hosts"  # hosts have it as /var/cache/llamaherd
UV = shutil.which("uv") or str(Path.home() / ".cache/llamaherd/tool/bin/uv")
RECAP = re.compile(r"^(\S+)\s+: ok=(\d+)\s+changed=(\d+)\s+unreachable=(\d+)\s+failed=(\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Run:
    """One finished playbook; `changed` counts the tasks that changed something, by host."""

    rc: int
    output: str
    changed: dict[str, int]

    @property
    def errors(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("[ERROR]:")]


# What a deployment left on a host. Lab hosts share one tree of cgroups: systemd keeps the name of a unit that has gone
# while a unit of that name runs on another host.
LEFT = """
ls -d /root/.cache/pip /opt/llamaherd /etc/llamaherd /var/lib/llamaherd* /var/lib/private/llamaherd* /run/llamaherd* \\
  /etc/systemd/system/llamaherd* /etc/systemd/system/*/llamaherd* /etc/nginx/*llamaherd* /etc/nginx/*/*llamaherd* \\
  /etc/cron*/*llamaherd* /etc/prometheus/llamaherd /var/lib/prometheus/llamaherd /etc/apt/*/llamaherd* \\
  /usr/share/keyrings/llamaherd* /var/log/llamaherd* 2>/dev/null
grep llamaherd /etc/passwd /etc/group
systemctl list-units --all --plain --no-legend 'llamaherd*' | grep -v ' not-found  *inactive '
true
"""


class Herd:
    """The hosts of one inventory."""

    def __init__(self, inventory: Path) -> None:
        self.inventory = inventory

    def play(self, name: str, *arguments: str) -> Run:
        command = [str(BIN / "ansible-playbook"), "-i", str(self.inventory), f"playbooks/{name}", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        output = done.stdout + done.stderr
        print(output[-20_000:])
        changed = {host: int(count) for host, _, count, *_ in RECAP.findall(output)}
        return Run(done.returncode, output, changed)

    def succeed(self, name: str, *arguments: str) -> Run:
        run = self.play(name, *arguments)
        assert run.rc == 0, f"{name} failed: {run.errors or run.output[-2000:]}"
        return run

    def sh(self, host: str, command: str, timeout_s: float = 60) -> str:
        """The output of `command` on `host`; fails the test when the command does."""
        secrets = self.inventory / ".secrets"
        ssh = ["ssh", "-i", str(secrets / "lab_ed25519"), "-o", f"UserKnownHostsFile={secrets / 'known_hosts'}"]
        done = subprocess.run(
            [*ssh, f"root@{self.address(host)}", command],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
        assert done.returncode == 0, f"{command!r} on {host}: {done.stderr or done.stdout}"
        return done.stdout

    def address(self, host: str) -> str:
        found = re.search(
            rf"^\s+{host}:\s+ansible_host: (\S+)", (self.inventory / "hosts.yml").read_text(), re.MULTILINE
        )
        assert found, f"no {host} in {self.inventory}"
        return found.group(1)


@contextmanager
def booted(folder: Path, *changes: tuple[str, str], of: str = "inventory_fleet") -> Iterator[Herd]:
    """The hosts of this inventory, after these changes to its text, with nothing on them; they go at the end."""
    inventory = folder / "lab"
    shutil.copytree(Path(__file__).parent / of, inventory)
    hosts = inventory / "hosts.yml"
    for old, new in changes:
        hosts.write_text(hosts.read_text().replace(old, new))
    herd = Herd(inventory)
    with Path(f"/run/lock/llamaherd-test-{of}").open("w") as lock:
        try:  # a test run that was killed lets go of it
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pytest.fail(f"the hosts of tests/lab/{of} are in use by another run of the tests: wait for its end")
        try:
            herd.succeed("lab.yml")
            yield herd
        finally:
            herd.succeed("lab.yml", "-e", "llamaherd_lab_state=absent")


@pytest.fixture(
    scope="module", params=["bookworm", pytest.param("trixie", marks=pytest.mark.fleet)], ids=["debian12", "debian13"]
)
def herd(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Herd]:
    """One fresh host `t1`."""
    with booted(tmp_path_factory.mktemp("inventory"), ("bookworm", request.param), of="inventory") as herd:
        yield herd


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Herd]:
    """Two fresh hosts, `t1` and `t2`."""
    second = "        t2:\n          ansible_host: 198.18.0.22\n          llamaherd_lab_release: bookworm\n"
    listed = ("      vars:\n        ansible_user", f"{second}      vars:\n        ansible_user")
    serving = ("        t1:\n      vars:", "        t1:\n        t2:\n      vars:")
    with booted(tmp_path_factory.mktemp("inventory"), listed, serving, of="inventory") as pair:
        yield pair


@pytest.fixture(scope="session")
def paced_server() -> Iterator[str]:
    """A folder with the server and the double for Debian 12's Python, by the path that all lab hosts see it under."""
    CACHE.mkdir(parents=True, exist_ok=True)
    folder = Path(mkdtemp(dir=CACHE))
    try:
        folder.chmod(0o755)
        install = [UV, "pip", "install", "--quiet", "--no-deps", "--python-version=3.11", f"--target={folder}"]
        subprocess.run([*install, "-r", "server/requirements.lock"], cwd=ROOT, check=True)
        shutil.copytree(ROOT / "server/llamaherd_server", folder / "llamaherd_server")
        for name in ("paced_worker.py", "doubled/sitecustomize.py"):
            shutil.copy(ROOT / "tests/server" / name, folder)
        yield f"/var/cache/llamaherd/{folder.name}"
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Herd]:
    """e1 before f1 and f2, deployed; f3 is booted. A fleet that stands already serves for work on these tests.

    It stands until the session's end: modules that boot this inventory for themselves have names before test_fleet.
    """
    if standing := os.environ.get("LLAMAHERD_TEST_FLEET"):  # its copied inventory
        yield Herd(Path(standing))
        return
    with booted(tmp_path_factory.mktemp("inventory")) as fleet:
        fleet.succeed("deploy.yml")
        yield fleet


@pytest.fixture(scope="session")
def better(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lab's model in another quantisation."""
    path = tmp_path_factory.mktemp("model") / "better.gguf"
    quantize = Path(os.environ["LLAMAHERD_TEST_BIN_DIR"]) / "llama-quantize"
    command = [str(quantize), "--allow-requantize", os.environ["LLAMAHERD_TEST_MODEL"], str(path), "Q4_0"]
    subprocess.run(command, check=True, capture_output=True)
    return path
