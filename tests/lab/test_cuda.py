"""A host that looks as one with an NVIDIA card does, but for the card: all that a deploy does there but compute on it.

Its device, its driver's programs and NVIDIA's repository are stand-ins; apt, systemd and the roles are real. The build
is one for the CPU, so that the deploy ends where it must: no layer is on a GPU.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.debian import need
from tests.lab.conftest import LEFT, Herd

pytestmark = [
    pytest.mark.lab,
    pytest.mark.fleet,
    pytest.mark.timeout(3000),
    pytest.mark.parametrize("herd", ["bookworm"], indirect=True),  # test_spine.py has the other Debian
]

SERVED = "http://198.18.0.21:8099"
DEVICES = "/dev/nvidia0 /dev/nvidiactl"
# As Debian's driver makes the devices; nvidia-modprobe tells what it was asked for.
CARD = f"""set -e
for device in {DEVICES}; do mknod -m 0660 $device c 1 3; chgrp video $device; done
cat >/usr/bin/nvidia-smi <<'END'
#!/bin/sh
if [ $# -gt 0 ]; then echo "NVIDIA L4, 8.9, 23034, 570.86.15"
else echo "| NVIDIA-SMI 570.86.15  Driver Version: 570.86.15  CUDA Version: 12.8 |"; fi
END
printf '#!/bin/sh\\necho "$@" >>/run/modprobe\\n' >/usr/bin/nvidia-modprobe
chmod +x /usr/bin/nvidia-*
systemd-run --quiet --unit=served python3 -m http.server --directory /tmp/served --bind 198.18.0.21 8099
"""


def package(folder: Path, version: str) -> str:
    """A cuda-toolkit package with an nvcc of this version; returns its entry in the index."""
    name, tree = f"cuda-toolkit-{version.replace('.', '-')}", folder / version
    nvcc = tree / f"usr/local/cuda-{version}/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
    nvcc.chmod(0o755)
    control = (
        f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@localhost>\nDescription: nvcc\n"
    )
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN/control").write_text(control)
    deb = folder / f"served/{name}.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", str(tree), str(deb)], check=True, capture_output=True)
    content = deb.read_bytes()
    return f"{control}Filename: ./{deb.name}\nSize: {len(content)}\nSHA256: {hashlib.sha256(content).hexdigest()}\n"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what NVIDIA's repository has: packages, an index that is signed, and the armored key."""
    need("gpg")
    folder = tmp_path_factory.mktemp("repository")
    served = folder / "served"
    served.mkdir()
    packages = "\n".join(package(folder, version) for version in ("12.4", "13.0"))
    (served / "Packages").write_text(packages)
    digest, size = hashlib.sha256(packages.encode()).hexdigest(), len(packages.encode())
    (served / "Release").write_text(f"Date: Thu, 01 Jan 2026 00:00:00 UTC\nSHA256:\n {digest} {size} Packages\n")
    home = folder / "gnupg"
    home.mkdir(mode=0o700)
    gpg = ["gpg", "--homedir", str(home), "--batch", "--yes", "--pinentry-mode", "loopback", "--passphrase", ""]
    subprocess.run([*gpg, "--quick-gen-key", "test", "rsa2048", "sign", "never"], check=True)
    subprocess.run([*gpg, "--armor", "--detach-sign", "-o", f"{served}/Release.gpg", f"{served}/Release"], check=True)
    subprocess.run([*gpg, "--armor", "--export", "-o", f"{served}/key.pub"], check=True)
    subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "all"], check=False)
    return served


@pytest.fixture(scope="module")
def carded(herd: Herd, repository: Path) -> Herd:
    secrets = herd.inventory / ".secrets"
    remote = ["-i", str(secrets / "lab_ed25519"), "-o", f"UserKnownHostsFile={secrets / 'known_hosts'}"]
    subprocess.run(["scp", "-q", "-r", *remote, str(repository), f"root@{herd.address('t1')}:/tmp/served"], check=True)
    herd.sh("t1", CARD)
    return herd


def variables(repository: Path, toolkit: str) -> list[str]:
    named: dict[str, Any] = {
        "llamaherd_llama_cpp_cmake_flags": ["-DGGML_CUDA=OFF"],
        "llamaherd_llama_cpp_cuda_packages": {"Debian": [f"cuda-toolkit-{toolkit}"]},
        "llamaherd_llama_cpp_cuda_repository": {
            "url": SERVED,
            "key_url": f"{SERVED}/key.pub",
            "key_sha256": hashlib.sha256((repository / "key.pub").read_bytes()).hexdigest(),
        },
    }
    return ["-e", json.dumps(named)]


def test_check_mode_knows_the_card_and_touches_nothing(carded: Herd, repository: Path) -> None:
    run = carded.succeed("deploy.yml", "--check", *variables(repository, "12-4"))
    assert "0.3.36-cuda-" in run.output
    assert carded.sh("t1", LEFT).strip() == ""


def test_a_toolkit_that_the_driver_cannot_run_is_told_before_anything_is_built(carded: Herd, repository: Path) -> None:
    run = carded.play("deploy.yml", *variables(repository, "13-0"))
    assert run.rc != 0
    assert "nvcc is of CUDA 13.0, the driver 570.86.15 runs CUDA 12.8 at most" in run.errors[0]
    assert carded.sh("t1", "ls /var/lib/llamaherd 2>/dev/null || true") == ""


def test_a_deploy_without_a_layer_on_the_card_says_so(carded: Herd, repository: Path) -> None:
    # As the refusal says: an older toolkit beside the newer one, which is not the one to take then.
    carded.sh("t1", "apt-get install -y -q cuda-toolkit-12-4")
    run = carded.play("deploy.yml", *variables(repository, "12-4"))
    assert run.rc != 0
    assert "llamaherd_accelerator is cuda, but llama.cpp put no layer on it" in run.errors[0]


def test_the_cards_devices_are_made_before_the_server_starts(carded: Herd) -> None:
    assert carded.sh("t1", "cat /run/modprobe") == "-u -c 0\n"
    order = carded.sh("t1", "systemctl show -P After llamaherd-server").split()
    assert "llamaherd-nvidia.service" in order


def test_the_servers_sandbox_lets_it_open_them(carded: Herd) -> None:
    """With the rights that the unit has, which its whole sandbox may take away again."""
    unit = "/etc/systemd/system/llamaherd-server.service"
    sandbox = f"sed -n '/^CapabilityBoundingSet=/,/^SystemCallErrorNumber=/s/^[A-Z]/-p\\n&/p' {unit}"
    opened = "; ".join(f"exec 3<>{device}" for device in DEVICES.split())
    run = "xargs -d '\\n' systemd-run --quiet --wait --pipe -p User=llamaherd -p Group=llamaherd </tmp/sandbox"
    carded.sh("t1", f"{sandbox} >/tmp/sandbox; printf 'sh\\n-ec\\n{opened}\\n' >>/tmp/sandbox; {run}")


def test_reset_leaves_nothing_behind(carded: Herd) -> None:
    carded.succeed("reset.yml", "-e", '{"skip_confirmation": true}')
    assert carded.sh("t1", LEFT).strip() == ""
