"""A host with no way out is deployed from a bundle that a connected one of its kind packed."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.conftest import Herd, booted

pytestmark = [pytest.mark.lab, pytest.mark.fleet, pytest.mark.timeout(3000)]

COMPILED = Path.home() / ".cache/llamaherd/hosts/ccache"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("offline")


@pytest.fixture(scope="module")
def packed(folder: Path) -> Iterator[Herd]:
    """`t1` packed a bundle into folder/bundle, and was booted afresh without a network but the controller's."""
    if COMPILED.exists():  # saves minutes, and is nothing that a bundle holds
        shutil.copytree(COMPILED, folder / "cache/ccache")
    with booted(folder, of="inventory") as herd:
        herd.succeed("bundle.yml", "-e", f"llamaherd_bundle_folder={folder / 'bundle'}")
        alone = {"llamaherd_lab_nat": False, "llamaherd_lab_cache_dir": str(folder / "cache")}
        herd.succeed("lab.yml", "-e", json.dumps(alone))
        herd.sh("t1", "ip route del default; rm -rf /var/lib/apt/lists/* /var/cache/apt/archives/*.deb")
        yield herd


@pytest.fixture(scope="module")
def bundle(packed: Herd, folder: Path) -> str:
    return json.dumps({"llamaherd_bundle": str(folder / "bundle")})


def test_its_sums_are_sha256sums(packed: Herd, folder: Path) -> None:
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=folder / "bundle",
        capture_output=True,
        text=True,
        check=True,
    )
    assert checked.stdout.count(": OK") == 2
    assert "debian-12-x86_64.tar: OK" in checked.stdout


def test_another_pack_than_was_promised_is_refused(packed: Herd, folder: Path, tmp_path: Path) -> None:
    sums = (folder / "bundle/SHA256SUMS").read_text().splitlines()
    (tmp_path / "SHA256SUMS").write_text(
        "\n".join("0" * 64 + line[64:] if line.endswith(".tar") else line for line in sums)
    )
    (tmp_path / "debian-12-x86_64.tar").symlink_to(folder / "bundle/debian-12-x86_64.tar")
    run = packed.play("deploy.yml", "-e", json.dumps({"llamaherd_bundle": str(tmp_path)}))
    assert run.rc != 0
    assert "0" * 64 in run.errors[0]
    assert run.changed["t1"] == 0


def test_deploy_without_a_network(packed: Herd, bundle: str) -> None:
    assert "unreachable" in packed.sh("t1", "ip route get 192.0.2.1 2>&1 || true")
    packed.succeed("deploy.yml", "-e", bundle)
    packed.succeed("verify.yml", "-e", bundle)


def test_a_second_deploy_changes_nothing(packed: Herd, bundle: str) -> None:
    assert packed.succeed("deploy.yml", "-e", bundle).changed["t1"] == 0
