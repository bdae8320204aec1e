"""Every flag that we give to llama-server, and every value of each setting, is one that the pinned binary takes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest

from llamaherd_server.config.extra_args import OWNED, check_extra_args
from llamaherd_server.engine.flags import flags
from llamaherd_server.wire.engine_settings import EngineSettings, KvType, Placement, Speculative
from llamaherd_server.wire.protocol import Adapter, NativeConfig

from ..conftest import required

SETTINGS = [
    EngineSettings(),
    EngineSettings(kv_unified=False, parallel=3, batch=64, ubatch=32, ctx_per_slot=300),
    EngineSettings(kv_cells=1024, threads=2, threads_batch=3),
    *(EngineSettings(kv_type_k=kind, kv_type_v=kind) for kind in get_args(KvType)),
    *(EngineSettings(flash_attention=use) for use in ("auto", "on", "off")),
    *(EngineSettings(speculative=kind, speculative_depth=5) for kind in get_args(Speculative)),
]


ALL_PLACED = Placement(
    gpu_layers=7,
    cpu_moe_layers=2,
    devices=["none"],
    split_mode="row",
    tensor_split=[3, 1.5],
    main_gpu=1,
    load_mode="mmap+mlock",
    numa="isolate",
)
PLACEMENTS = [
    Placement(),
    Placement(gpu_layers="auto"),
    ALL_PLACED,
    *(Placement(load_mode=mode) for mode in ("none", "mmap", "mlock", "dio")),
    *(Placement(split_mode=mode) for mode in ("none", "layer", "tensor")),
    *(Placement(numa=mode) for mode in ("distribute", "numactl")),
]
OWN: dict[str, Any] = {
    "mmproj": "p.gguf",
    "draft": "d.gguf",
    "chat_template": "chat.jinja",
    "lora": [Adapter("a.gguf", 0.5), Adapter("b.gguf", 1.0)],
}


def command(settings: EngineSettings, **more: Any) -> list[str]:
    return flags(NativeConfig(name="m", binary="", path="m.gguf", settings=settings, **more), "s.sock")


def binary() -> str:
    return str(Path(required("LLAMAHERD_TEST_BIN_DIR")) / "llama-server")


@pytest.fixture(scope="module")
def names() -> list[list[str]]:
    """The names of each flag that --help lists."""
    text = subprocess.run([binary(), "--help"], capture_output=True, text=True, check=True).stdout
    return [found[0].replace(",", " ").split() for found in re.finditer(r"^--?[\w-]+(, +--?[\w-]+)*", text, re.M)]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_binary_takes_what_is_emitted(settings: EngineSettings, placement: Placement, tmp_path: Path) -> None:
    # arguments are read in order and --version ends it, after the ones before were checked
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    arguments = [*command(settings, placement=placement, **OWN), "--version"]
    ended = subprocess.run([binary(), *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(("layers", "fit"), [("auto", "on"), (-1, "off"), (7, "off")])
def test_llama_cpp_places_layers_only_where_that_is_asked_for(layers: Any, fit: str) -> None:
    words = command(EngineSettings(), placement=Placement(gpu_layers=layers))
    assert words[words.index("--fit") + 1] == fit
    assert words[words.index("--gpu-layers") + 1] == {-1: "all"}.get(layers, str(layers))


def test_the_binary_refuses_what_it_does_not_know() -> None:
    ended = subprocess.run([binary(), "--no-such-flag", "--version"], capture_output=True, check=False)
    assert ended.returncode != 0


def test_whatever_is_emitted_is_owned_by_all_its_names(names: list[list[str]]) -> None:
    emitted = {
        word
        for settings in SETTINGS
        for word in command(settings, placement=ALL_PLACED, **OWN)
        if re.match("--?[a-z]", word) and not word.startswith("--spec-")
    }
    assert emitted <= {name for line in names for name in line}
    for line in names:
        if emitted & {*line}:
            assert {*line} <= OWNED


@pytest.mark.parametrize("argument", ["--port", "--api-key=x", "-m", "-ngl", "--host"])
def test_what_is_ours_is_refused_as_an_extra_argument(argument: str) -> None:
    with pytest.raises(ValueError, match=re.escape(argument.partition("=")[0])):
        check_extra_args(["--cache-ram", "0", argument])


@pytest.mark.parametrize("argument", ["--sleep-idle-seconds", "--media-path=/srv", "--cors-origins"])
def test_what_would_do_nothing_is_refused_with_the_reason(argument: str) -> None:
    with pytest.raises(ValueError, match=r"has no effect here: .+; remove it"):
        check_extra_args([argument, "1"])
