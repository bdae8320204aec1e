"""llamaherd_server_runtime: container."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.roles.conftest import Render, Rendered, run_roles

RUN = "llamaherd-server-container.service"


def command(rendered: Rendered) -> list[str]:
    unit = rendered.text(RUN).replace("\\\n", " ")
    return shlex.split(next(line for line in unit.splitlines() if line.startswith("ExecStart=")).partition("=")[2])


@pytest.fixture
def contained(render: Render) -> Rendered:
    return render("debian12", llamaherd_server_runtime="container")


def test_the_container_gets_its_settings_and_models_to_read_and_one_folder_to_write(contained: Rendered) -> None:
    words = command(contained)
    assert words[:2] == ["/usr/bin/podman", "run"]
    assert {"--read-only", "--cap-drop=all", "--security-opt=no-new-privileges", "--network=host"} <= set(words)
    volumes = [word.partition("=")[2].split(":") for word in words if word.startswith("--volume")]
    assert [(source == target, mode) for source, target, *mode in volumes] == [(True, ["ro"])] * 2 + [(True, [])]
    assert volumes[-1][0] == str(contained.state_dir / "usage")
    image, flag, config = words[-3:]
    assert (image, flag) == ("localhost/llamaherd", "--config")
    read = [Path(source) for source, *_ in volumes]
    for path in (config, contained.state_dir / "models/smollm2-135m-instruct.gguf", contained.folder / "keys.toml"):
        assert any(Path(path).is_relative_to(folder) for folder in read), path


def test_gpus_come_by_cdi(render: Render) -> None:
    devices = [word for word in command(render("cuda", llamaherd_server_runtime="container")) if "device" in word]
    assert devices == ["--device=nvidia.com/gpu=all"]
    some = command(render("cuda", llamaherd_server_runtime="container", llamaherd_server_devices="0,2"))
    assert [word for word in some if "device" in word] == ["--device=nvidia.com/gpu=0", "--device=nvidia.com/gpu=2"]


@pytest.mark.parametrize(
    ("host", "variables", "said"),
    [
        ("macos", {}, "it needs systemd, this host has launchd"),
        ("rocm", {}, "the image has no rocm build"),
        ("debian12", {"llamaherd_llama_cpp_method": "release"}, "the image holds its own llama.cpp"),
    ],
    ids=lambda one: one if isinstance(one, str) and " " not in one else None,
)
def test_what_cannot_go_together_is_refused(tmp_path: Path, host: str, variables: dict[str, Any], said: str) -> None:
    run = run_roles(tmp_path, host, {"llamaherd_server_runtime": "container", **variables})
    assert run.returncode != 0
    assert "llamaherd_server_runtime is container: " in run.stdout + run.stderr
    assert said in run.stdout + run.stderr
