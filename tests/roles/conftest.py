"""Hosts that exist only as recorded facts, and what the roles would write for them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PLAYBOOK = Path(sys.executable).with_name("ansible-playbook")


def accelerator(kind: str, reason: str, gib: int) -> dict[str, Any]:
    none = {"gpus": [], "cuda": {"driver": "", "toolkit": "", "nvcc": ""}}
    return none | {"accelerator": kind, "accelerator_reason": reason, "accelerator_memory_bytes": gib << 30}


NO_GPU = accelerator("cpu", "no NVIDIA device", 0)
H100 = {"name": "NVIDIA H100", "architecture": "90", "memory_bytes": 80 << 30, "driver": "570.86.15"}
CUDA = accelerator("cuda", "an NVIDIA device", 80) | {
    "gpus": [H100],
    "cuda": {"driver": "12.8", "toolkit": "12.4", "nvcc": "/usr/local/cuda/bin/nvcc"},
}
METAL = accelerator("metal", "Apple silicon", 32)
LINUX: dict[str, Any] = {
    "system": "Linux",
    "architecture": "x86_64",
    "service_mgr": "systemd",
    "python_version": "3.11.2",
    "user_uid": 0,
    "llamaherd": NO_GPU
    | {"memory_bytes": 16 << 30, "listeners": [], "free_bytes": {"/opt": 99 << 30}, "libc": "glibc 2.36"},
}


def linux(distribution: str, family: str, version: str, **more: Any) -> dict[str, Any]:
    major = version.split(".", maxsplit=1)[0]
    names = {"distribution": distribution, "os_family": family, "distribution_version": version}
    return LINUX | names | {"distribution_major_version": major} | more


HOSTS: dict[str, dict[str, Any]] = {
    "debian12": linux("Debian", "Debian", "12"),
    "debian13": linux("Debian", "Debian", "13", python_version="3.13.5"),
    "ubuntu2404": linux("Ubuntu", "Debian", "24.04", python_version="3.12.3"),
    "rocky9": linux("Rocky", "RedHat", "9.4"),
    "cuda": linux("Ubuntu", "Debian", "22.04", llamaherd=LINUX["llamaherd"] | CUDA),
    "macos": {
        "system": "Darwin",
        "architecture": "arm64",
        "distribution": "MacOSX",
        "os_family": "Darwin",
        "distribution_version": "14.5",
        "distribution_major_version": "14",
        "service_mgr": "launchd",
        "python_version": "3.12.4",
        "user_uid": 0,
        "llamaherd": METAL | {"memory_bytes": 32 << 30, "listeners": [], "free_bytes": {"/opt": 99 << 30}, "libc": ""},
    },
}


@dataclass(frozen=True)
class Rendered:
    """The files that one host would get, and what the roles decided."""

    folder: Path
    state_dir: Path
    secrets_dir: Path

    def text(self, name: str) -> str:
        return (self.folder / name).read_text()

    @property
    def decided(self) -> dict[str, Any]:
        decided: dict[str, Any] = json.loads(self.text("decided.json"))
        return decided


Render = Callable[..., Rendered]


def render_into(folder: Path, host: str, variables: dict[str, Any]) -> Rendered:
    """Render for `host` of HOSTS with more `variables` in the inventory; fails with ansible's output."""
    out = folder / "out"
    for path in (out, folder / "state/models"):
        path.mkdir(parents=True, exist_ok=True)
    (folder / "state/models/smollm2-135m-instruct.gguf").touch()
    variables |= {
        "facts": HOSTS[host],
        "ansible_python_interpreter": sys.executable,
        "out": str(out),
        "llamaherd_state_dir": str(folder / "state"),
        "llamaherd_config_dir": str(out),
        "llamaherd_secrets_dir": str(folder / "secrets"),
    }
    inventory = folder / "hosts.yml"
    inventory.write_text(
        yaml.safe_dump(
            {"all": {"vars": variables}, "inference": {"hosts": {host: None}}, "edge": {"hosts": {host: None}}}
        )
    )
    done = subprocess.run(
        [str(PLAYBOOK), "-i", str(inventory), "tests/roles/render.yml", "--tags", "render"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Rendered(out, folder / "state", folder / "secrets")


@pytest.fixture(scope="session")
def render(tmp_path_factory: pytest.TempPathFactory) -> Render:
    """render(host, **variables), each combination once a session."""
    done: dict[str, Rendered] = {}

    def once(host: str, **variables: Any) -> Rendered:
        key = json.dumps([host, variables], sort_keys=True)
        if key not in done:
            done[key] = render_into(tmp_path_factory.mktemp(host), host, variables)
        return done[key]

    return once


@pytest.fixture(params=HOSTS)
def rendered(request: pytest.FixtureRequest, render: Render) -> Rendered:
    return render(request.param)


@pytest.fixture
def debian(render: Render) -> Rendered:
    return render("debian12")
