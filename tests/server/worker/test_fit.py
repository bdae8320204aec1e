"""What `llama-fit-params` prints becomes a placement; tests/lab/test_vulkan.py has it find one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llamaherd_server.wire.engine_settings import EngineSettings, Placement
from llamaherd_server.worker.fit import PROGRAM, fitted
from llamaherd_server.worker.weights import ModelError

AUTO = Placement(gpu_layers="auto", devices=["Vulkan0"])
SETTINGS = EngineSettings(parallel=2, ctx_per_slot=1024)


def build(folder: Path, script: str | None, *, offloads: bool = True) -> Any:
    """A libllama with this llama-fit-params beside it."""
    if script is not None:
        program = folder / PROGRAM
        program.write_text(f'#!/bin/sh\necho "$@" >{folder}/asked\n{script}\n')
        program.chmod(0o755)
    library = SimpleNamespace(_name=str(folder / "libllama.so"))
    return SimpleNamespace(_lib=library, llama_supports_gpu_offload=lambda: offloads)


@pytest.mark.parametrize(
    ("printed", "layers", "shares", "overrides"),
    [
        ("-c 2048 -ngl -1", -1, [], []),
        ("-c 2048 -ngl 12", 12, [], []),
        ("-c 2048 -ngl 31 -ts 20,11", 31, [20, 11], []),
        (
            r'-c 2048 -ngl 31 -ot "blk\.3\.ffn_down.*=CPU,blk\.4\.ffn_(up|down)_(ch|)exps=Vulkan1"',
            31,
            [],
            [(r"blk\.3\.ffn_down.*", "CPU"), (r"blk\.4\.ffn_(up|down)_(ch|)exps", "Vulkan1")],
        ),
    ],
)
def test_the_result_is_read(
    tmp_path: Path, printed: str, layers: int, shares: list[float], overrides: list[tuple[str, str]]
) -> None:
    found = fitted(build(tmp_path, f"cat <<'END'\n{printed}\nEND"), "m.gguf", AUTO, SETTINGS)
    assert found.placement == Placement(gpu_layers=layers, devices=["Vulkan0"], tensor_split=shares)
    assert found.overrides == overrides
    asked = (tmp_path / "asked").read_text()
    assert "--model m.gguf --parallel 2 --ctx-size 2048 " in asked
    assert "--device Vulkan0 --offline" in asked


def test_numbers_are_what_they_are(tmp_path: Path) -> None:
    assert fitted(build(tmp_path, None), "m.gguf", Placement(gpu_layers=3), SETTINGS).placement.gpu_layers == 3


def test_without_an_accelerator_no_layer_is_on_it(tmp_path: Path) -> None:
    assert fitted(build(tmp_path, None, offloads=False), "m.gguf", AUTO, SETTINGS).placement.gpu_layers == 0


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (None, r"gpu_layers auto needs .*/llama-fit-params, which this build lacks: add llama-fit-params to"),
        ("echo said; echo '0.33.219 W failed to fit' >&2; exit 1", "found no placement for m.gguf: failed to fit"),
        ("echo aborted >&2; exit 134", "found no placement for m.gguf: aborted"),
        ("exit 3", "found no placement for m.gguf: exit code 3"),
        ("echo something else", "found no placement for m.gguf: exit code 0"),
    ],
)
def test_a_failure_is_one_line(tmp_path: Path, script: str | None, expected: str) -> None:
    with pytest.raises(ModelError, match=expected):
        fitted(build(tmp_path, script), "m.gguf", AUTO, SETTINGS)
