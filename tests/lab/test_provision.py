"""Other ways to bring llama.cpp than a build on each host, on two hosts that have nothing yet."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.lab.conftest import Herd, Run

pytestmark = [pytest.mark.lab, pytest.mark.fleet, pytest.mark.timeout(3000)]

ROOT = "/opt/llamaherd/llama.cpp"
SERVED = "/tmp/served/b1/llama-b1-bin-ubuntu-x64.tar.gz"
# One CPU backend instead of thirteen: minutes less to compile.
SHARED = {"llamaherd_llama_cpp_strategy": "shared", "llamaherd_llama_cpp_cmake_flags": ["-DGGML_CPU_ALL_VARIANTS=OFF"]}


def bring(herd: Herd, variables: Mapping[str, object], *arguments: str) -> Run:
    return herd.play("../tests/lab/plays/llama_cpp.yml", "-e", json.dumps(dict(variables)), *arguments)


def current(herd: Herd, host: str) -> str:
    return herd.sh(host, f"readlink {ROOT}/current || true").strip()


def test_a_host_whose_builder_failed_says_so_and_keeps_what_it_has(pair: Herd) -> None:
    run = bring(pair, SHARED | {"llamaherd_llama_cpp_targets": ["no-such-program"]})
    assert run.rc != 0
    assert any("t2 needs the release that t1 builds" in line for line in run.errors)
    assert current(pair, "t1") == current(pair, "t2") == ""


def test_one_builds_and_the_other_receives(pair: Herd) -> None:
    assert bring(pair, SHARED).rc == 0
    assert current(pair, "t1") == current(pair, "t2") != ""
    for host in ("t1", "t2"):
        assert "version:" in pair.sh(host, f"{ROOT}/current/bin/llama-server --version 2>&1")
    assert "ccache" not in pair.sh("t2", "ls /usr/bin"), "only the builder needs a compiler"
    assert set(bring(pair, SHARED).changed.values()) == {0}


@pytest.fixture(scope="module")
def prebuilt(pair: Herd) -> dict[str, object]:
    """Variables for an archive as llama.cpp publishes it, made of t1's build and served by t1."""
    packed = pair.sh(
        "t1",
        f"mkdir -p {Path(SERVED).parent}/llama-b1 && cd {Path(SERVED).parent} && "
        f"cp -a {ROOT}/current/lib/. llama-b1/ && tar -czf {SERVED} llama-b1 && "
        f"sha256sum {SERVED}",
    )
    pair.sh("t1", "systemd-run --unit=served python3 -m http.server --directory /tmp/served --bind 198.18.0.21 8099")
    return {
        "llamaherd_llama_cpp_method": "release",
        "llamaherd_llama_cpp_release_url": "http://198.18.0.21:8099",
        "llamaherd_llama_cpp_release_archives": {
            "Linux-x86_64-cpu": {"path": str(Path(SERVED).relative_to("/tmp/served")), "sha256": packed.split()[0]}
        },
    }


def test_a_prebuilt_archive(pair: Herd, prebuilt: dict[str, object]) -> None:
    before = current(pair, "t2")
    assert bring(pair, prebuilt, "--limit", "t2").rc == 0
    assert current(pair, "t2").startswith("release-cpu-")
    assert "version:" in pair.sh("t2", f"{ROOT}/current/bin/llama-server --version 2>&1")
    assert pair.sh("t2", f"readlink {ROOT}/previous").strip() == before
    assert bring(pair, prebuilt, "--limit", "t2").changed["t2"] == 0


def test_another_archive_than_was_promised_is_refused(pair: Herd, prebuilt: dict[str, object]) -> None:
    before = current(pair, "t2")
    archives = {"Linux-x86_64-cpu": {"path": str(Path(SERVED).relative_to("/tmp/served")), "sha256": "0" * 64}}
    run = bring(pair, prebuilt | {"llamaherd_llama_cpp_release_archives": archives}, "--limit", "t2")
    assert run.rc != 0
    assert "0" * 64 in run.errors[0]
    assert current(pair, "t2") == before


def test_the_embedded_engine_refuses_a_prebuilt_archive(pair: Herd, prebuilt: dict[str, object]) -> None:
    run = pair.play("deploy.yml", "-e", json.dumps(prebuilt))
    assert run.rc != 0
    assert "llamaherd_engine to llama-server" in run.errors[0]
    assert set(run.changed.values()) == {0}


LOCK = (
    'import fcntl, time; f = open("/var/lib/dpkg/lock-frontend", "w"); fcntl.lockf(f, fcntl.LOCK_EX); time.sleep(600)'
)


def install(herd: Herd, *packages: str, **variables: object) -> Run:
    extra = json.dumps({"packages": packages, **variables})
    return herd.play("../tests/lab/plays/packages.yml", "-e", extra, "--limit", "t1")


def test_a_package_that_no_source_has_is_one_line(pair: Herd) -> None:
    [error] = install(pair, "tree", "no-such-package").errors
    assert "package sources have no no-such-package; run `apt update`" in error


def test_packages_wait_for_the_lock(pair: Herd) -> None:
    pair.sh("t1", f"systemd-run --quiet --unit=lock python3 -c '{LOCK}'; sleep 1")
    [error] = install(pair, "tree", llamaherd_packages_wait_s=2).errors
    assert "locked by process" in error
    assert "raise llamaherd_packages_wait_s" in error
    pair.sh("t1", "systemd-run --quiet --on-active=15 systemctl stop lock")
    assert install(pair, "tree").rc == 0


SMALL_DISK = {**SHARED, "llamaherd_state_dir": "/srv/small", "llamaherd_prefix": "/srv/prefix"}


def test_a_disk_that_fills_up_is_one_line_and_the_next_run_goes_on(pair: Herd) -> None:
    pair.sh("t1", "mkdir -p /srv/small; mount -t tmpfs -o size=150m tmpfs /srv/small")
    [error] = bring(pair, SMALL_DISK, "--limit", "t1").errors
    assert "no space left on the file system /srv/small (0 MiB)" in error
    assert "make room there and run the play again" in error
    pair.sh("t1", "mount -o remount,size=3g /srv/small")
    assert bring(pair, SMALL_DISK, "--limit", "t1").rc == 0
    pair.sh("t1", "umount /srv/small; rm -r /srv/small /srv/prefix")
