"""llamaherd as a collection: built, installed into another project, and deployed from there by a play of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.lab.conftest import ROOT, Herd
from tests.server.conftest import Server, free_port, required, until_ready

pytestmark = pytest.mark.timeout(900)

BIN = Path(sys.executable).parent
# Roles by their full names, and one play of the collection's own.
SITE = """\
- hosts: inference
  gather_facts: false
  roles:
    - llamaherd.llamaherd.preflight
    - llamaherd.llamaherd.llama_cpp
    - llamaherd.llamaherd.model
    - llamaherd.llamaherd.server
    - llamaherd.llamaherd.nginx

- ansible.builtin.import_playbook: llamaherd.llamaherd.status
"""


class Project:
    """A folder with an ansible.cfg, a play and our archive in its `collections`; nothing of this checkout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.collection = folder / "collections/ansible_collections/llamaherd/llamaherd"
        (folder / "ansible.cfg").write_text("[defaults]\ncollections_path = collections\n")
        (folder / "site.yml").write_text(SITE)
        self.run("ansible-galaxy", "collection", "build", "--output-path", str(folder), str(ROOT))
        (self.archive,) = folder.glob("llamaherd-llamaherd-*.tar.gz")
        self.run("ansible-galaxy", "collection", "install", "--offline", "-p", "collections", str(self.archive))

    def run(self, *command: str) -> str:
        """What the command says; fails the test when it fails."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
        done = subprocess.run(
            [str(BIN / command[0]), *command[1:]],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        print(done.stdout[-20_000:], done.stderr[-5_000:])
        assert done.returncode == 0, f"{' '.join(command)} failed: {done.stderr or done.stdout[-2000:]}"
        return done.stdout

    def installed(self) -> set[str]:
        """The collection's files, less what Python itself leaves."""
        files = (path.relative_to(self.collection) for path in self.collection.rglob("*"))
        return {str(file) for file in files if "__pycache__" not in file.parts}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("project"))


def loopback(folder: Path) -> dict[str, Any]:
    """An inventory like inventories/loopback, everything under `folder` but the llama.cpp that is built already."""
    inventory: dict[str, Any] = yaml.safe_load((ROOT / "inventories/loopback/hosts.yml").read_text())
    model = required("LLAMAHERD_TEST_MODEL")
    built = Path(required("LLAMAHERD_TEST_LIB_DIR")).parents[1]
    (folder / "herd").mkdir()
    (folder / "herd/llama.cpp").symlink_to(built)
    sha256 = yaml.safe_load((ROOT / "roles/common/defaults/main.yml").read_text())["llamaherd_models"][0]["sha256"]
    inventory["all"]["vars"] |= {
        "llamaherd_prefix": str(folder / "herd"),
        "llamaherd_server_port": free_port(),
        "llamaherd_models": [{"name": "tiny", "sha256": sha256, "source": {"kind": "file", "path": model}}],
        "llamaherd_settings": {"parallel": 1, "ctx_per_slot": 512, "threads": 1, "threads_batch": 1},
    }
    return inventory


@contextmanager
def serving(project: Project, port: int) -> Iterator[Server]:
    """The server that was deployed, as the plain process that the loopback way leaves to its user."""
    herd = project.folder / "herd"
    python, library = herd / "server/current/venv/bin/python", str(herd / "llama.cpp/current/lib")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with (herd / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [str(python), "-m", "llamaherd_server", "--config", str(herd / "config/server.toml")],
            env=environment | {"LLAMA_CPP_LIB_PATH": library, "MTMD_CPP_LIB": library},
            stderr=log,
        )
    with until_ready(Server(f"http://127.0.0.1:{port}", process, herd / "server.log")) as server:
        yield server


def test_the_archive_holds_what_roles_need_and_nothing_else(project: Project) -> None:
    with tarfile.open(project.archive) as archive:
        names = archive.getnames()
    top = {name.partition("/")[0] for name in names}
    files = {"CHANGELOG.md", "CONTRIBUTING.md", "FILES.json", "LICENSE", "MANIFEST.json", "README.md", "SECURITY.md"}
    assert top == files | {
        *(
            "changelogs",
            "loadtest",
            "meta",
            "playbooks",
            "plugins",
            "requirements.yml",
            "roles",
            "server",
            "templates",
            "tests",
        )
    }
    assert {name.split("/")[1] for name in names if name.startswith("tests/")} == {"__init__.py", "sanity", "verify"}
    assert not [name for name in names if re.search(r"(^|/)\.|__pycache__|\.(key|crt|pyc)$", name)]


def test_a_project_deploys_with_roles_of_the_collection(project: Project) -> None:
    inventory = loopback(project.folder)
    (project.folder / "hosts.yml").write_text(yaml.safe_dump(inventory))
    before = project.installed()
    said = project.run("ansible-playbook", "-i", "hosts.yml", "site.yml")
    assert "localhost" in said
    assert project.installed() == before
    with serving(project, inventory["all"]["vars"]["llamaherd_server_port"]) as server:
        key = (project.folder / ".secrets/keys/default").read_text().strip()
        reply = httpx.post(
            f"{server.url}/v1/completions",
            json={"model": "tiny", "prompt": "The capital of France is", "max_tokens": 8},
            headers={"Authorization": f"Bearer {key}"},
        )
    assert reply.json()["usage"]["completion_tokens"] > 0


@pytest.mark.lab
@pytest.mark.fleet
def test_a_project_deploys_to_a_host_and_verifies(project: Project, herd: Herd) -> None:
    project.run("ansible-playbook", "-i", str(herd.inventory), "site.yml")
    assert herd.sh("t1", "systemctl is-active llamaherd-server nginx").split() == ["active", "active"]
    project.run("ansible-playbook", "-i", str(herd.inventory), "llamaherd.llamaherd.verify")
    assert (herd.inventory / ".build/verify/t1.xml").exists()
