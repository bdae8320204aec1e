"""Another llama.cpp than the binding's own: what it must have for the engine embedded is looked at by a compiler."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml

from tests.roles.conftest import play

URL = "https://example.org/b9999.tar.gz"


def compare(folder: Path, engine: str) -> CompletedProcess[str]:
    """roles/llama_cpp's comparison alone, over the headers in `folder`."""
    variables = {
        "ansible_python_interpreter": sys.executable,
        "llamaherd_llama_cpp_source": {"kind": "git-archive", "url": URL, "sha256": "0" * 64},
        "llamaherd_llama_cpp_version": "0.3.36",
        "_llama_cpp_tree": str(folder),
        "_common_served": [{"engine": engine}],
    }
    role = {"ansible.builtin.include_role": {"name": "llama_cpp", "tasks_from": "abi"}}
    playbook = folder / "abi.yml"
    playbook.write_text(yaml.safe_dump([{"hosts": "localhost", "gather_facts": False, "tasks": [role]}]))
    (folder / "variables.json").write_text(json.dumps(variables))
    return play(folder, "-i", "localhost,", "-c", "local", str(playbook), "-e", f"@{folder / 'variables.json'}")


@pytest.mark.parametrize(("engine", "served"), [("embedded", False), ("llama-server", True)])
def test_one_that_differs_serves_through_llama_server_only(tmp_path: Path, engine: str, served: bool) -> None:
    (tmp_path / "include").mkdir()
    (tmp_path / "include/llama.h").write_text("struct llama_model_params { int n_gpu_layers; };\n")
    run = compare(tmp_path, engine)
    assert (run.returncode == 0) is served, run.stdout + run.stderr
    said = " ".join(run.stdout.split())
    assert (f"{URL} differs from the llama.cpp" in said and "error: static assertion" in said) is not served
