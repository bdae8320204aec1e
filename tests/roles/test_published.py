"""playbooks/models.yml on this machine over a double of the hub: what it prints, writes, and never shows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml

from tests.hub import Hub, serving
from tests.roles.conftest import play
from tests.unit.test_gguf import SMALL

Models = Callable[..., CompletedProcess[str]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    files = {"small-Q4_K_M.gguf": SMALL, "small-Q8_0.gguf": SMALL + bytes(1 << 20)}
    with serving(Hub({"o/small-GGUF": files}, {"o/small-GGUF"}, "hf_secret")) as hub:
        yield hub


@pytest.fixture
def models(tmp_path: Path, hub: Hub) -> Models:
    def run(model: str, *arguments: str) -> CompletedProcess[str]:
        variables = {
            "llamaherd_service_manager": "none",
            "llamaherd_state_dir": str(tmp_path / "state"),
            "llamaherd_prefix": str(tmp_path / "prefix"),
            "llamaherd_model_hf_url": hub.url,
            "llamaherd_model_hf_token": "hf_secret",
            "ansible_connection": "local",
            "ansible_become": False,
            "ansible_python_interpreter": sys.executable,
        }
        inventory = tmp_path / "hosts.yml"
        inventory.write_text(yaml.safe_dump({"inference": {"hosts": {"h1": variables, "h2": variables}}}))
        return play(tmp_path, "-i", str(inventory), "playbooks/models.yml", "-e", f"model={model}", "-vvv", *arguments)

    return run


def test_a_model_is_listed_and_fits_are_printed(tmp_path: Path, hub: Hub, models: Models) -> None:
    run = models("hf:o/small-GGUF:Q4_K_M")
    said = run.stdout + run.stderr
    assert run.returncode == 0, said
    for host in ("h1", "h2"):
        assert f"{host}, with parallel 4:" in said
    assert said.count("small-Q4_K_M.gguf  0.00 GiB") >= 2
    assert "hf_secret" not in said
    written = yaml.safe_load((tmp_path / "group_vars/all/models.yml").read_text())["llamaherd_models"]
    assert [(one["name"], one["source"]["file"]) for one in written] == [("small", "small-Q4_K_M.gguf")]
    asked = len(hub.asked)
    assert "changed=0" in models("hf:o/small-GGUF:Q4_K_M").stdout.partition("h1 ")[2]
    assert asked == 3, "one listing, one redirect and one range for both hosts"


def test_what_there_is_and_what_there_is_not(tmp_path: Path, models: Models) -> None:
    run = models("hf:o/small-GGUF", "-e", "llamaherd_model=chat")  # which is not listed yet
    said = run.stdout + run.stderr
    assert run.returncode == 0, said
    assert said.index("Q4_K_M ") < said.index("Q8_0 ")
    assert not (tmp_path / "group_vars").exists()
    run = models("hf:o/small-GGUF:Q5_K_M")
    assert run.returncode != 0
    assert "has no Q5_K_M; the nearest is Q4_K_M; it has Q4_K_M, Q8_0" in run.stdout + run.stderr
