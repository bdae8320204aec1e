"""The filters: what a release's name depends on, and TOML as a TOML parser reads it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st


def test_a_trees_hash_follows_names_and_contents_alone(filters: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package/a.py").write_text("a")
    first = filters.tree_hash(str(tmp_path))
    (tmp_path / "package/__pycache__").mkdir()
    (tmp_path / "package/__pycache__/a.pyc").write_text("compiled")
    (tmp_path / ".hidden").write_text("an editor's")
    assert filters.tree_hash(str(tmp_path)) == first
    (tmp_path / "package/a.py").rename(tmp_path / "package/b.py")
    second = filters.tree_hash(str(tmp_path))
    (tmp_path / "package/b.py").write_text("b")
    assert len({first, second, filters.tree_hash(str(tmp_path))}) == 3


@given(st.text(st.characters(codec="utf-8")), st.integers(-(2**63), 2**63 - 1), st.booleans())
def test_toml_reads_back(filters: ModuleType, text: str, number: int, flag: bool) -> None:
    table = {"text": text, "number": number, "flag": flag}
    assert tomllib.loads(filters.to_toml(table)) == table


def host(driver: str, toolkit: str, *architectures: str) -> dict[str, object]:
    gpus = [{"architecture": one, "driver": "570.86.15"} for one in architectures]
    return {"gpus": gpus, "cuda": {"driver": driver, "toolkit": toolkit}}


@pytest.mark.parametrize(
    ("facts", "architectures", "expected"),
    [
        pytest.param(host("12.8", "12.4", "90"), "native", [], id="all well"),
        pytest.param(host("12.8", "", "90"), "native", [], id="a toolkit is yet to be installed"),
        pytest.param(host("12.2", "12.8", "120"), "native", [], id="a newer toolkit of the driver's major version"),
        pytest.param(host("", "12.4"), "native", ["no driver"], id="no driver"),
        pytest.param(
            host("12.8", "13.0", "90"), "native", ["driver 570.86.15 runs CUDA 12.8 at most"], id="old driver"
        ),
        pytest.param(
            host("12.4", "11.5", "89", "89"), "native", ["89 needs a toolkit of 11.8"], id="Ubuntu 22.04's nvcc"
        ),
        pytest.param(
            host("13.0", "13.0", "70"), "native", ["70 needs a toolkit older than 13"], id="dropped by CUDA 13"
        ),
        pytest.param(
            host("12.8", "12.4", "90"), "90a-real;120a-real", ["120a-real needs a toolkit of 12.8"], id="listed"
        ),
    ],
)
def test_driver_toolkit_and_gpus_go_together(
    filters: ModuleType, facts: dict[str, object], architectures: str, expected: list[str]
) -> None:
    found = filters.cuda_mistakes(facts, architectures)
    assert len(found) == len(expected)
    assert all(part in line for part, line in zip(expected, found, strict=True))


def test_the_log_tells_how_many_layers_are_on_a_gpu(filters: ModuleType) -> None:
    assert filters.gpu_layers("load_tensors: offloaded 31/31 layers to GPU\nready") == 31
    assert filters.gpu_layers("load_tensors: offloaded 0/31 layers to GPU") == 0
    assert filters.gpu_layers("ready") == 0


def test_a_table_aligns_its_columns(filters: ModuleType) -> None:
    assert filters.table([["host", "slots"], ["gpu1.internal", 4]]) == ["host           slots", "gpu1.internal  4"]
