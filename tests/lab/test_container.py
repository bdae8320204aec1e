"""The image: built from containers/Containerfile over a Debian made here, and run as compose.yml runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from configparser import RawConfigParser
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.debian import need
from tests.lab.conftest import LEFT, ROOT, Herd, booted
from tests.roles.conftest import Rendered, run_roles
from tests.roles.test_container import command
from tests.server.conftest import Server, free_port, required, until_ready

CONTAINERS = ROOT / "containers"
CACHE = Path.home() / ".cache/llamaherd"
ROOTFS = CACHE / "containers/bookworm"
STORE = [f"--root={CACHE / 'containers/storage'}", "--runroot=/run/llamaherd-containers", "--storage-driver=overlay"]
BASE, IMAGE, NAME = "localhost/llamaherd-test-base", "localhost/llamaherd-test", "llamaherd-test"
# The certificates that this machine trusts, where apt's own do not replace them.
PIP_CONF = "[global]\ncert = /etc/ssl/builder.crt\n"


def run(*command: str, cwd: Path = ROOT, check: bool = True) -> str:
    """What the command says, both streams; fails the test when it fails."""
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout[-5000:])
    assert done.returncode == 0 or not check, f"{' '.join(command)}: {done.stdout[-2000:]}"
    return done.stdout


def base_image() -> None:
    """A Debian from nothing but packages, for those who cannot pull one."""
    if not (ROOTFS / "etc/pip.conf").exists():
        shutil.rmtree(ROOTFS, ignore_errors=True)
        ROOTFS.mkdir(parents=True)
        run("debootstrap", "--variant=minbase", "bookworm", str(ROOTFS))
        (ROOTFS / "etc/ssl").mkdir(exist_ok=True)
        shutil.copy("/etc/ssl/certs/ca-certificates.crt", ROOTFS / "etc/ssl/builder.crt")
        (ROOTFS / "etc/pip.conf").write_text(PIP_CONF)
    if not run("buildah", *STORE, "images", "--quiet", BASE, check=False).strip().isalnum():
        container = run("buildah", *STORE, "from", "scratch").strip()
        run("buildah", *STORE, "add", container, str(ROOTFS), "/")
        run("buildah", *STORE, "commit", "--rm", container, BASE)


@pytest.fixture(scope="module")
def image() -> str:
    """The image's name. Its layers stay in the cache: only what changed is built again."""
    need("buildah")
    base_image()
    kept = {CACHE / "hosts/ccache": "/var/cache/ccache", CACHE / "containers/debs": "/var/cache/apt/archives"}
    for folder in kept:
        (folder / "partial").mkdir(parents=True, exist_ok=True)
    # One CPU backend instead of thirteen: minutes less to compile.
    arguments = [f"--build-arg=BASE={BASE}", "--build-arg=CMAKE_FLAGS=-DGGML_CPU_ALL_VARIANTS=OFF"]
    run(
        *("buildah", *STORE, "build", "--isolation=chroot", "--layers", "--format=docker", *arguments),
        *(f"--volume={folder}:{path}" for folder, path in kept.items()),
        *("--tag", IMAGE, "--file", str(CONTAINERS / "Containerfile"), "."),
    )
    return IMAGE


class Podman:
    """podman in a mount namespace of its own.

    There the unified hierarchy of hybrid control groups, which crun refuses, is out of sight.
    """

    def __init__(self) -> None:
        hide = "umount /sys/fs/cgroup/unified 2>/dev/null; echo; exec sleep infinity"
        self.namespace = subprocess.Popen(["unshare", "--mount", "sh", "-c", hide], stdout=subprocess.PIPE)
        assert self.namespace.stdout is not None
        self.namespace.stdout.readline()

    def command(self, *arguments: str) -> list[str]:
        return ["nsenter", "--mount", f"--target={self.namespace.pid}", "podman", *STORE, *arguments]

    def __call__(self, *arguments: str, check: bool = True) -> str:
        return run(*self.command(*arguments), check=check)


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    podman = Podman()
    try:
        yield podman
    finally:
        podman("rm", "--force", "--time=0", "--ignore", NAME, check=False)
        podman("volume", "rm", "--force", NAME, check=False)
        podman.namespace.kill()
        podman.namespace.wait()


def quadlet() -> RawConfigParser:
    parser = RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(CONTAINERS / "llamaherd.container")
    return parser


def compose() -> dict[str, Any]:
    service: dict[str, Any] = yaml.safe_load((CONTAINERS / "compose.yml").read_text())["services"]["server"]
    return service


def render_container(folder: Path, image: str, variables: dict[str, Any]) -> Rendered:
    """What a host gets whose server is to be a container of `image`."""
    variables = {"llamaherd_server_runtime": "container", "llamaherd_server_image": image, **variables}
    run = run_roles(folder, "debian12", variables)
    assert run.returncode == 0, run.stdout
    return Rendered(folder / "out", folder / "state", folder / "secrets")


# As compose.yml says it, but for the bridge, whose firewall rules would stay; a kernel may refuse higher limits.
HARDENED = ["--read-only", "--tmpfs=/tmp", "--cap-drop=all", "--security-opt=no-new-privileges", "--network=host"]
HERE = ["--cgroups=disabled", "--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024", f"--volume={NAME}:/keys"]


@pytest.fixture(scope="module")
def key(podman: Podman, image: str) -> str:
    """A key that the image's own command made in the volume."""
    said = podman("run", "--rm", *HARDENED, *HERE, image, "keys", "--file=/keys/keys.toml", "add", "test")
    return next(line for line in reversed(said.split()) if len(line) >= 40)


@pytest.fixture(scope="module")
def server(podman: Podman, image: str, key: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model, port = Path(required("LLAMAHERD_TEST_MODEL")).resolve(), free_port()
    settings = {"HTTP__HOST": "127.0.0.1", "HTTP__PORT": port, "ENGINE__PARALLEL": 1, "ENGINE__CTX_PER_SLOT": 512}
    environment = [f"--env=LLAMAHERD_{name}={value}" for name, value in settings.items()]
    mounts = [f"--volume={model}:/models/model.gguf:ro"]
    log = tmp_path_factory.mktemp("container") / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            podman.command("run", "--name", NAME, *HARDENED, *HERE, *mounts, *environment, image),
            stdout=output,
            stderr=output,
            # podman's timers for health checks need systemd; `podman healthcheck run` does not.
            env={**os.environ, "DISABLE_HC_SYSTEMD": "true"},
        )
    with until_ready(Server(f"http://127.0.0.1:{port}", process, log)) as server:
        yield server


@pytest.mark.lab
@pytest.mark.fleet
@pytest.mark.timeout(3600)
class TestImage:
    def test_a_completion_with_the_key_and_none_without(self, server: Server, key: str) -> None:
        asked = {"model": "model", "prompt": "The capital of France is", "max_tokens": 8}
        with httpx.Client(base_url=server.url, timeout=60) as client:
            assert client.post("/v1/completions", json=asked).status_code == 401
            reply = client.post("/v1/completions", json=asked, headers={"Authorization": f"Bearer {key}"})
        assert reply.json()["usage"]["completion_tokens"] > 0

    def test_it_runs_without_root_capabilities_or_a_file_to_write(self, server: Server, podman: Podman) -> None:
        status = podman("exec", NAME, "cat", "/proc/1/status")
        assert re.search(r"^Uid:\s+10001\s+10001", status, re.MULTILINE)
        assert re.search(r"^CapBnd:\s+0+$", status, re.MULTILINE)
        assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)
        for path in ("/opt/llamaherd/x", "/etc/llamaherd/x", "/models/x"):
            assert "Read-only file system" in podman("exec", NAME, "touch", path, check=False)

    def test_the_health_check_asks_the_server(self, server: Server, podman: Podman) -> None:
        port = server.url.rpartition(":")[2]
        (check,) = re.findall(r"^  CMD \[(.*)\]$", (CONTAINERS / "Containerfile").read_text(), re.MULTILINE)
        python, flag, program = yaml.safe_load(f"[{check}]")
        podman("exec", NAME, python, flag, program.replace("8080", port))
        assert "refused" in podman("exec", NAME, python, flag, program.replace("8080", "1"), check=False)

    def test_it_stops_in_order_when_told(self, server: Server, podman: Podman) -> None:
        podman("stop", "--time=30", NAME)
        assert server.process.wait(30) == 0

    def test_what_the_roles_unit_runs_serves_with_the_inventorys_settings(
        self, podman: Podman, image: str, tmp_path: Path
    ) -> None:
        port = free_port()
        settings = {"llamaherd_server_port": port, "llamaherd_settings": {"parallel": 1, "ctx_per_slot": 512}}
        rendered = render_container(tmp_path, image, settings)
        shutil.copy(required("LLAMAHERD_TEST_MODEL"), rendered.state_dir / "models/smollm2-135m-instruct.gguf")
        for path in (rendered.folder, *rendered.folder.iterdir(), *rendered.state_dir.glob("models/*")):
            path.chmod(path.stat().st_mode | 0o055)
        _program, *words = command(rendered)
        # What needs a unit around it, or a user that this machine has not.
        words = [word for word in words if not word.startswith(("--cgroups", "--sdnotify", "--log-driver", "--ulimit"))]
        words = [f"--name={NAME}" if word.startswith("--name") else word for word in words]
        words = ["--user=10001:10001" if word.startswith("--user") else word for word in words]
        limits = [word for word in HERE if not word.startswith("--volume")]
        log = tmp_path / "server.log"
        with log.open("wb") as output:
            process = subprocess.Popen(podman.command("run", *limits, *words[1:]), stdout=output, stderr=output)
        key = (rendered.secrets_dir / "keys/admin").read_text().strip()
        with until_ready(Server(f"http://127.0.0.1:{port}", process, log)) as server:
            reply = httpx.get(f"{server.url}/admin/engine", headers={"Authorization": f"Bearer {key}"})
            podman("stop", "--time=30", NAME)
        assert (reply.json()["settings"]["parallel"], reply.json()["settings"]["ctx_per_slot"]) == (1, 512)


@pytest.fixture(scope="module")
def contained(podman: Podman, image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Herd]:
    """One host, which serves from a container of the image."""
    folder = tmp_path_factory.mktemp("contained")
    podman("save", f"--output={folder / 'image.tar'}", image)
    host = "          llamaherd_lab_release: bookworm\n"
    asked = {
        "llamaherd_lab_containers": "true",
        "llamaherd_server_runtime": "container",
        "llamaherd_server_image": image,
        "llamaherd_server_image_archive": folder / "image.tar",
    }
    more = "".join(f"          {name}: {value}\n" for name, value in asked.items())
    with booted(folder, (host, host + more), of="inventory") as herd:
        herd.sh("t1", RUNC)
        herd.succeed("deploy.yml")
        yield herd
    shutil.rmtree(CACHE / "hosts/images")  # what the host kept in the cache that all lab hosts share


# Where root may not raise limits, as in many a virtual machine, crun starts nothing, and runc only what asks for none.
RUNC = """set -e
apt-get update -qq && apt-get install -y -qq --no-install-recommends curl runc >/dev/null
mkdir -p /etc/containers
cat >/etc/containers/containers.conf <<'CONF'
[engine]
runtime = "runc"
[engine.runtimes]
runc = ["/usr/local/bin/runc"]
CONF
install -m 755 /dev/stdin /usr/local/bin/runc <<'PYTHON'
#!/usr/bin/python3
import json, os, pathlib, sys
if "--bundle" in sys.argv:
    path = pathlib.Path(sys.argv[sys.argv.index("--bundle") + 1], "config.json")
    config = json.loads(path.read_text())
    config["process"].pop("rlimits", None)
    path.write_text(json.dumps(config))
os.execv("/usr/sbin/runc", ["runc", *sys.argv[1:]])
PYTHON
"""


@pytest.mark.lab
@pytest.mark.fleet
@pytest.mark.timeout(3600)
class TestOnAHost:
    def test_podman_serves_under_systemd(self, contained: Herd) -> None:
        """Type=notify: that the deployment ended says that the container told of its model."""
        unit = "systemctl show --property=ActiveState,SubState,MainPID llamaherd-server"
        assert {"ActiveState=active", "SubState=running"} <= set(contained.sh("t1", unit).split())
        groups = contained.sh("t1", "cat /sys/fs/cgroup/system.slice/llamaherd-server.service/*/cgroup.procs")
        names = contained.sh("t1", f"ps -o args= -p {','.join(groups.split())}")
        assert "-m llamaherd_server" in names
        assert "llamaherd_server.worker" in names
        assert contained.sh("t1", "ls /opt/llamaherd").split() == ["tools"], "pip, which fetched the model's package"

    def test_verify(self, contained: Herd) -> None:
        contained.succeed("verify.yml")

    def test_a_second_deploy_changes_nothing(self, contained: Herd) -> None:
        assert contained.succeed("deploy.yml").changed["t1"] == 0
        assert contained.succeed("deploy.yml", "--check").changed["t1"] == 0

    def test_other_settings_are_in_force_after_a_deploy(self, contained: Herd) -> None:
        settings = {"llamaherd_settings": {"parallel": 2, "ctx_per_slot": 512}}
        contained.succeed("deploy.yml", "--tags", "config", "-e", json.dumps(settings))
        assert "llamaherd_slots{" in (said := contained.sh("t1", "curl -s http://127.0.0.1:8080/metrics"))
        assert re.search(r"^llamaherd_slots\{.*\} 2\.0$", said, re.MULTILINE)

    def test_a_dead_container_comes_back(self, contained: Herd) -> None:
        before = contained.sh("t1", "podman inspect --format={{.Id}} llamaherd-server")
        contained.sh("t1", "podman kill --signal=KILL llamaherd-server && sleep 1; systemctl start llamaherd-server")
        assert contained.sh("t1", "podman inspect --format={{.Id}} llamaherd-server") != before
        assert contained.sh("t1", "curl -s http://127.0.0.1:8080/readyz")

    def test_it_drains_when_the_unit_stops(self, contained: Herd) -> None:
        contained.sh("t1", "systemctl stop llamaherd-server")
        shown = contained.sh("t1", "systemctl show --property=Result,ActiveState llamaherd-server").split()
        assert set(shown) == {"Result=success", "ActiveState=inactive"}
        assert contained.sh("t1", "podman ps --all --quiet").strip() == ""
        contained.sh("t1", "systemctl start llamaherd-server")

    def test_reset_leaves_nothing_behind(self, contained: Herd) -> None:
        contained.succeed("reset.yml", "-e", '{"skip_confirmation": true}')
        assert contained.sh("t1", LEFT).strip() == ""
        assert contained.sh("t1", "podman ps --all --quiet; podman images --quiet").strip() == ""


def test_the_image_has_what_the_playbooks_have() -> None:
    text = (CONTAINERS / "Containerfile").read_text()
    defaults = yaml.safe_load((ROOT / "roles/common/defaults/main.yml").read_text())
    assert f"ARG LLAMA_CPP_VERSION={defaults['llamaherd_llama_cpp_version']}\n" in text
    assert f"ARG LLAMA_CPP_SHA256={defaults['llamaherd_llama_cpp_sha256']}\n" in text
    role = yaml.safe_load((ROOT / "roles/llama_cpp/vars/main.yml").read_text())
    flags = re.findall(r"-D\w+=\w+", role["_llama_cpp_flags"]) + role["_llama_cpp_travelling_flags"]
    assert len(flags) > 8
    assert [flag for flag in flags if flag not in text] == []
    packages = yaml.safe_load((ROOT / "roles/common/vars/main.yml").read_text())["_common_packages_for"]
    assert set(packages["compiling"]["Debian"]) <= set(text.split())


def test_compose_and_the_quadlet_give_the_server_nothing_that_it_does_not_need() -> None:
    service, container = compose(), quadlet()["Container"]
    assert service["read_only"] is (container["ReadOnly"] == "true") is True
    assert service["cap_drop"] == ["ALL"]
    assert container["DropCapability"] == "all"
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert container["NoNewPrivileges"] == "true"
    assert service["ports"] == [container["PublishPort"]] == ["127.0.0.1:8080:8080"]
