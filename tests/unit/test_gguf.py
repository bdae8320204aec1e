"""The header reader on a real model, and on truncated, corrupt and hostile files."""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from gguf import GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from tests.random_models import Kind, RandomModel
from tests.split_model import split

SETTINGS: dict[str, Any] = {
    "parallel": 4,
    "ctx_per_slot": 2048,
    "ubatch": 512,
    "kv_cells": 0,
    "kv_unified": True,
    "flash_attention": "auto",
    "kv_type_k": "f16",
    "kv_type_v": "f16",
}
MIB = 2**20


@pytest.fixture(scope="session")
def model() -> Path:
    path = os.environ.get("LLAMAHERD_TEST_MODEL")
    assert path, "LLAMAHERD_TEST_MODEL is not set: run `make test`"
    return Path(path)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def file(keys: bytes, n_keys: int, *, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return magic + struct.pack("<IQQ", version, 0, n_keys) + keys


def u32(key: str, value: int) -> bytes:
    return text(key) + struct.pack("<II", 4, value)


SMALL = file(
    text("general.architecture") + struct.pack("<I", 8) + text("llama")
    + u32("llama.block_count", 2) + u32("llama.attention.head_count", 4) + u32("llama.attention.head_count_kv", 2)
    + u32("llama.embedding_length", 64) + u32("llama.context_length", 512) + u32("llama.feed_forward_length", 128),
    7,
)  # fmt: skip


def test_the_real_model(gguf: ModuleType, model: Path) -> None:
    shape = gguf.shape(gguf.read_header(model))
    assert (shape.architecture, shape.n_layers, shape.n_ctx_train, shape.n_vocab) == ("llama", 30, 8192, 49152)
    # 30 layers x 3 KV heads x (64 + 64) x 2 bytes; llama.cpp allocates 180 MiB for 8192 tokens.
    assert gguf.kv_bytes(shape, SETTINGS) == 180 * MIB


def allocated(model: Path, settings: dict[str, Any]) -> dict[str, float]:
    """MiB of all buffers that llama-server's log tells of at these settings."""
    cells = settings["kv_cells"] or settings["parallel"] * settings["ctx_per_slot"]
    flags = ["--parallel", settings["parallel"], "--ctx-size", cells, "--ubatch-size", settings["ubatch"]]
    flags += [
        "--flash-attn",
        settings["flash_attention"],
        "--kv-unified" if settings["kv_unified"] else "--no-kv-unified",
    ]
    flags += ["--cache-type-k", settings["kv_type_k"], "--cache-type-v", settings["kv_type_v"]]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [f"{os.environ['LLAMAHERD_TEST_BIN_DIR']}/llama-server", "--model", model, "--port", port, *flags]
    server = subprocess.Popen(
        [*map(str, command), "--no-warmup", "--verbose"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert server.stdout
        sizes: dict[str, float] = {}
        for line in server.stdout:
            if found := re.search(r"(\w+) buffer size = +([\d.]+) MiB", line):
                sizes[found[1]] = float(found[2]) + (sizes.get("KV", 0) if found[1] == "KV" else 0)
            if ": listening on http" in line:
                break
        assert {"model", "KV", "output", "compute"} <= set(sizes)
        return sizes
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"kv_unified": False},
        {
            "parallel": 8,
            "ctx_per_slot": 500,
            "kv_unified": False,
            "ubatch": 128,
            "kv_type_k": "q8_0",
            "kv_type_v": "q8_0",
        },
        {"parallel": 1, "ctx_per_slot": 32768, "ubatch": 2048},
        {"kv_cells": 3072, "ubatch": 64},
        {"flash_attention": "off", "ubatch": 256, "ctx_per_slot": 8192},
        {"flash_attention": "off", "kv_unified": False, "kv_type_k": "q4_0"},
    ],
    ids=lambda changed: ",".join(f"{name}={value}" for name, value in changed.items()) or "defaults",
)
def test_what_preflight_computes_is_what_llama_cpp_allocates(
    gguf_info: ModuleType, model: Path, changed: dict[str, Any]
) -> None:
    settings = SETTINGS | changed
    needed = gguf_info.needs(model, settings, 1 << 40)["needed_bytes"] / MIB
    assert needed == pytest.approx(sum(allocated(model, settings).values()), rel=0.1)


@pytest.mark.parametrize("kind", ["sliding_window", "hybrid"])
@pytest.mark.parametrize("unified", [True, False])
def test_layers_that_keep_less_of_the_context_count_so(gguf_info: ModuleType, kind: Kind, unified: bool) -> None:
    settings = SETTINGS | {"kv_unified": unified}
    path = RandomModel(kind, layers=6, width=128).path()
    computed = gguf_info.needs(path, settings, 1 << 40)["kv_bytes"] / MIB
    sizes = allocated(path, settings)
    assert computed == pytest.approx(sizes["KV"] + sizes.get("RS", 0), rel=0.1)


def test_drafts_keep_further_recurrent_states(gguf: ModuleType) -> None:
    shape = gguf.shape(gguf.read_header(RandomModel("hybrid", layers=6, width=128).path()))
    off, two, many = (
        gguf.kv_bytes(shape, SETTINGS | {"speculative": kind, "speculative_depth": depth})
        for kind, depth in (("off", 2), ("ngram", 2), ("ngram", 32))
    )
    states = 4 * 4 * 2 * 128 * SETTINGS["parallel"]  # f32, four layers that convolve, two tokens back
    assert (two - off, many - off) == (2 * states, gguf.MAX_ROLLBACK * states)


def test_layers_by_architecture(gguf: ModuleType) -> None:
    """By llama.cpp's hyperparameters: MLA, recurrent layers by interval, and layers that use others' cells."""
    base = {"block_count": 8, "embedding_length": 256, "context_length": 512, "attention.head_count": 4}

    def shape(architecture: str, **more: Any) -> Any:
        keys = {name.replace("__", "."): value for name, value in more.items()}
        values = {f"{architecture}.{name}": value for name, value in (base | keys).items()}
        return gguf.shape({"general.architecture": architecture, **values})

    latent = {"attention__head_count_kv": 1, "attention__key_length": 576, "attention__value_length": 512}
    mla = shape("deepseek2", **latent, attention__key_length_mla=192, attention__value_length_mla=128)
    assert gguf.kv_bytes(mla, SETTINGS) == 8 * 576 * 2 * 4 * 2048
    ssm = {"ssm__conv_kernel": 4, "ssm__inner_size": 512, "ssm__group_count": 2, "ssm__state_size": 16}
    interval = shape("qwen35", **ssm, attention__head_count_kv=2)
    assert interval.recurrent == [True, True, True, False] * 2
    assert interval.kv_heads == [0, 0, 0, 2] * 2
    assert interval.state == 3 * (512 + 2 * 2 * 16) + 16 * 512
    per_layer = shape(
        "nemotron_h", **ssm, attention__head_count_kv=[0, 0, 2, 0] * 2, feed_forward_length=[0, 9, 0, 9] * 2
    )
    assert per_layer.recurrent == [True, False, False, False] * 2
    shared = shape(
        *("gemma4",), attention__sliding_window=256, attention__sliding_window_pattern=[True, False] * 4,
        attention__shared_kv_layers=2, attention__key_length=128, attention__key_length_swa=64,
    )  # fmt: skip
    assert shared.kv_heads == [4] * 6 + [0] * 2
    assert shared.key_lengths == [64, 128] * 4
    assert shape("mamba", **ssm, attention__head_count=0).recurrent == [True] * 8


def test_what_does_not_fit_is_told_with_what_would(gguf_info: ModuleType, model: Path) -> None:
    memory = 1024 * MIB
    found = gguf_info.needs(model, SETTINGS | {"parallel": 64}, memory)
    assert found["needed_bytes"] > memory
    fitting = gguf_info.needs(model, SETTINGS | {"parallel": found["largest_parallel"]}, memory)
    too_much = gguf_info.needs(model, SETTINGS | {"parallel": found["largest_parallel"] + 1}, memory)
    assert fitting["needed_bytes"] <= memory < too_much["needed_bytes"]
    assert found["largest_ctx_per_slot"] % 256 == 0
    shorter = {"parallel": 64, "ctx_per_slot": found["largest_ctx_per_slot"]}
    assert gguf_info.needs(model, SETTINGS | shorter, memory)["needed_bytes"] <= memory


@pytest.mark.parametrize(
    ("parallel", "unified", "memory", "ctx", "cells"),
    [
        (1, True, 2**34, 8192, 0),
        (4, True, 2**34, 8192, 0),
        (4, False, 2**34, 8192, 0),
        (16, True, 2000 * MIB, 8192, 60160),  # the slots share what fits
        (16, False, 2000 * MIB, 3840, 0),
        (4, True, 300 * MIB, 8192, 8448),
        (4, True, 50 * MIB, 2048, 2048),  # less is no context: preflight refuses it
        (4, True, -1, 2048, 2048),
    ],
)
def test_a_context_that_is_not_said_is_the_trained_one_or_what_fits(
    gguf: ModuleType, model: Path, parallel: int, unified: bool, memory: int, ctx: int, cells: int
) -> None:
    shape = gguf.shape(gguf.read_header(model))
    settings = {**SETTINGS, "ctx_per_slot": 0, "parallel": parallel, "kv_unified": unified}
    found = gguf.with_context(shape, settings, memory)
    assert (found["ctx_per_slot"], found["kv_cells"]) == (ctx, cells)
    if ctx > gguf.MIN_CTX:
        assert gguf.kv_bytes(shape, found) + gguf.compute_bytes(shape, found) <= gguf.CONTEXT_SHARE * memory
    assert gguf.with_context(shape, SETTINGS, memory) == SETTINGS


def test_long_contexts_share_one(gguf: ModuleType, model: Path) -> None:
    shape = replace(gguf.shape(gguf.read_header(model)), n_ctx_train=131072)
    settings = {**SETTINGS, "ctx_per_slot": 0}
    assert gguf.with_context(shape, settings, 2**40) == {**settings, "ctx_per_slot": 131072, "kv_cells": 131072}
    many = {**settings, "parallel": 16}
    assert gguf.with_context(shape, many, 2**40) == {**many, "ctx_per_slot": 131072, "kv_cells": 16 * 16384}


def test_absurd_settings_are_told_as_fast_as_others(gguf_info: ModuleType, model: Path) -> None:
    absurd = gguf_info.needs(model, SETTINGS | {"parallel": 10**15, "ctx_per_slot": 10**15}, 1024 * MIB)
    assert (absurd["largest_parallel"], absurd["largest_ctx_per_slot"]) == (0, 0)


def test_a_small_header_is_read(gguf: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    path.write_bytes(SMALL)
    shape = gguf.shape(gguf.read_header(path))
    assert shape.kv_heads == [2, 2]
    assert shape.key_lengths == [16, 16]


def test_heads_may_differ_by_layer(gguf: ModuleType, tmp_path: Path) -> None:
    per_layer = text("llama.attention.head_count_kv") + struct.pack("<IIQ2i", 9, 5, 2, 0, 3)
    path = tmp_path / "layers.gguf"
    path.write_bytes(SMALL.replace(u32("llama.attention.head_count_kv", 2), per_layer))
    assert gguf.shape(gguf.read_header(path)).kv_heads == [0, 3]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(b"", "truncated", id="empty"),
        pytest.param(b"<html>404</html>", "not begin with GGUF", id="an error page"),
        pytest.param(file(b"", 0, version=1), "version 1", id="old version"),
        pytest.param(file(b"", 2**40), "number of keys", id="more keys than anyone has"),
        pytest.param(file(struct.pack("<Q", 2**63), 1), "length of a key", id="huge key"),
        pytest.param(file(text("k") + struct.pack("<IQ", 8, 2**62), 1), "length of k", id="huge string"),
        pytest.param(file(text("k") + struct.pack("<IIQ", 9, 4, 2**60), 1), "length of k", id="huge array"),
        pytest.param(file(text("k") + struct.pack("<IIQ", 9, 9, 1), 1), "unknown type 9", id="array of arrays"),
        pytest.param(file(text("k") + struct.pack("<I", 77), 1), "unknown type 77", id="unknown type"),
        pytest.param(file(text("k") + struct.pack("<I", 4), 1), "truncated", id="value missing"),
    ],
)
def test_a_bad_file_is_one_clear_error(gguf: ModuleType, tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(gguf.GgufError, match=expected):
        gguf.shape(gguf.read_header(path))


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(struct.pack("<IIQ", 9, 8, 2**24), id="empty strings"),
        pytest.param(struct.pack("<IQ", 8, 2**26), id="one long string"),
        pytest.param(struct.pack("<IIQ", 9, 10, 2**26), id="long array"),
    ],
)
def test_no_file_is_large_enough_for_an_endless_header(
    gguf: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: bytes
) -> None:
    path = tmp_path / "endless.gguf"
    path.write_bytes(file(text("k") + value, 1))
    os.truncate(path, 2**40)  # of zeros, which take no room
    monkeypatch.setattr(gguf, "MAX_HEADER", 2**20)
    with pytest.raises(gguf.GgufError, match="limited to 1048576"):
        gguf.read_header(path)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (u32("llama.block_count", 2), u32("llama.block_count", 2**30), "more than the 4096"),
        (u32("llama.embedding_length", 64), u32("llama.embedding_length", 0), "embedding_length is 0"),
        (u32("llama.context_length", 512), u32("other.context_length", 512), "context_length is missing"),
        (
            u32("llama.attention.head_count_kv", 2),
            text("llama.attention.head_count_kv") + struct.pack("<IIQ2i", 9, 5, 2, 4, -3),
            r"\[4, -3\] for 2 layers",
        ),
        (
            u32("llama.attention.head_count_kv", 2),
            text("llama.attention.head_count_kv") + struct.pack("<IIQi", 9, 5, 1, 4),
            r"\[4\] for 2 layers",
        ),
    ],
)
def test_absurd_shapes_are_named(gguf: ModuleType, tmp_path: Path, before: bytes, after: bytes, expected: str) -> None:
    path = tmp_path / "absurd.gguf"
    path.write_bytes(SMALL.replace(before, after))
    with pytest.raises(gguf.GgufError, match=expected):
        gguf.shape(gguf.read_header(path))


@given(end=st.integers(0, len(SMALL) - 1))
def test_every_truncation_is_an_error(gguf: ModuleType, tmp_path_factory: pytest.TempPathFactory, end: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "cut.gguf"
    path.write_bytes(SMALL[:end])
    with pytest.raises(gguf.GgufError):
        gguf.read_header(path)


@given(at=st.integers(4, len(SMALL) - 1), value=st.integers(0, 255))
def test_any_corrupt_byte_is_read_or_refused(
    gguf: ModuleType, tmp_path_factory: pytest.TempPathFactory, at: int, value: int
) -> None:
    path = tmp_path_factory.mktemp("corrupt") / "corrupt.gguf"
    path.write_bytes(SMALL[:at] + bytes([value]) + SMALL[at + 1 :])
    try:
        shape = gguf.shape(gguf.read_header(path))
    except gguf.GgufError:
        return
    assert 0 < shape.n_layers <= gguf.MAX_LAYERS


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A whole model and its three parts, behind a link of any name: [whole, link, first, second, third]."""
    folder, whole = tmp_path_factory.mktemp("split"), RandomModel("dense", layers=2, width=128).path()
    found = split(whole, folder / "m.gguf", 10)
    (folder / "link.gguf").symlink_to(found[0].name)
    return [whole, folder / "link.gguf", *found]


def test_all_parts_count(gguf_info: ModuleType, parts: list[Path]) -> None:
    whole, link, *files = parts
    one, several = (gguf_info.needs(path, SETTINGS, 1 << 40) for path in (whole, link))
    assert several.pop("weights_bytes") == sum(file.stat().st_size for file in files)
    assert several.pop("needed_bytes") == pytest.approx(one.pop("needed_bytes"), rel=0.01)
    one.pop("weights_bytes")
    assert several == one


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((1, 3, 2), "part 2 of 3 has split.no 2"),
        ((1, 2), "part 1 of 2 has split.no 0 and split.count 3"),
        ((1, 2, 2), "part 3 of 3 has split.no 1"),
        ((1,), "part 1 of 1 has split.no 0 and split.count 3"),
    ],
    ids=["swapped", "missing", "doubled", "alone"],
)
def test_parts_that_do_not_belong_together(
    gguf_info: ModuleType, gguf: ModuleType, parts: list[Path], tmp_path: Path, numbers: tuple[int, ...], expected: str
) -> None:
    names = gguf.part_names(f"m-00001-of-{len(numbers):05}.gguf")
    for name, number in zip(names, numbers, strict=True):
        (tmp_path / name).write_bytes(parts[1 + number].read_bytes())
    first = tmp_path / names[0]
    with pytest.raises(gguf.GgufError, match=expected):
        gguf_info.needs(first, SETTINGS, 1 << 40)


def test_a_part_may_be_a_link_of_its_name(gguf: ModuleType, tmp_path: Path) -> None:
    """As the hub's own cache has them, where parts are links to files of other names."""
    first = tmp_path / "m-00001-of-00002.gguf"
    (tmp_path / "blob").touch()
    first.symlink_to("blob")
    assert gguf.part_paths(first) == [first, tmp_path / "m-00002-of-00002.gguf"]
    assert gguf.part_paths(tmp_path / "m-00001-of-00000.gguf") == [tmp_path / "m-00001-of-00000.gguf"]


def test_what_is_loaded_beside_a_model_counts(gguf_info: ModuleType, model: Path, tmp_path: Path) -> None:
    """A draft model with a context of its own, and a projector, which has none."""
    alone = gguf_info.needs(model, SETTINGS, 1024 * MIB)
    projector = tmp_path / "p.gguf"
    writer = GGUFWriter(projector, "clip")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = gguf_info.needs(model, SETTINGS, 1024 * MIB, [model, projector])
    assert alone["beside_bytes"] == 0
    assert found["beside_bytes"] == alone["needed_bytes"] + projector.stat().st_size
    assert found["needed_bytes"] == alone["needed_bytes"] + found["beside_bytes"]
    assert found["largest_ctx_per_slot"] <= alone["largest_ctx_per_slot"]
