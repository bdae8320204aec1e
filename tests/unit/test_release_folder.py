"""The scripts of the role llama_cpp that make a release folder, on trees that a compiler made in a moment."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

import pytest
import yaml

from tests.unit.conftest import ROOT


def script(file: str, task: str) -> str:
    tasks = yaml.safe_load((ROOT / f"roles/llama_cpp/tasks/{file}").read_text())
    command: str = next(one for one in tasks if one["name"].startswith(task))["llamaherd.llamaherd.progress"]["argv"][2]
    return command


def library(path: Path, *needs: Path) -> None:
    """A shared library at `path` that calls into those of `needs`, which the loader would not find by itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name.partition(".")[0].replace("-", "_")
    calls = [other.name.partition(".")[0] for other in needs]
    source = (
        "".join(f"void {call}(void); " for call in calls)
        + f"void {name}(void) {{ {''.join(f'{call}();' for call in calls)} }}"
    )
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(path), f"-Wl,-soname,{path.name}"]
    subprocess.run(
        [*command, "-x", "none", *map(str, needs), "-Wl,--allow-shlib-undefined"], input=source, text=True, check=True
    )


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The work folder of a build: llama-server, and a backend that needs a toolkit in a place of its own."""
    toolkit = tmp_path / "cuda-13.0/lib64"
    library(toolkit / "libcublasLt.so.13")
    library(toolkit / "libcublas.so.13", toolkit / "libcublasLt.so.13")
    library(toolkit / "libcudart.so.13")
    library(tmp_path / "build/bin/libggml-cuda.so", toolkit / "libcublas.so.13", toolkit / "libcudart.so.13")
    (tmp_path / "build/CMakeCache.txt").write_text(f"CUDA_cublas_LIBRARY:FILEPATH={toolkit}/libcublas.so\n")
    (tmp_path / "build/bin/llama-server").touch(0o755)
    (tmp_path / "release/bin").mkdir(parents=True)
    (tmp_path / "release/lib").mkdir()
    return tmp_path


def install(work: Path) -> list[str]:
    command = script("install.yml", "Copy programs, libraries and Python binding to the release")
    subprocess.run(
        ["bash", "-c", command], cwd=work, env={"RELEASE": f"{work}/release", "PATH": "/usr/bin:/bin"}, check=True
    )
    return sorted(path.name for path in (work / "release/lib").iterdir())


def test_a_release_carries_what_it_needs_of_the_toolkit(work: Path) -> None:
    cuda = ["libcublas.so.13", "libcublasLt.so.13", "libcudart.so.13"]
    assert install(work) == [*cuda, "libggml-cuda.so", "llama-server"]
    assert not any((work / "release/lib" / name).is_symlink() for name in cuda)
    assert (work / "release/bin/llama-server").resolve() == work / "release/lib/llama-server"


def test_one_without_cuda_carries_nothing(work: Path) -> None:
    (work / "build/CMakeCache.txt").write_text("GGML_CUDA:BOOL=OFF\n")
    (work / "build/bin/libggml-cuda.so").unlink()
    assert install(work) == ["llama-server"]


def test_a_source_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    (tmp_path / "a/vendor").mkdir(parents=True)
    (tmp_path / "a/vendor/file").write_bytes(bytes(range(256)) * 4000)
    (tmp_path / "a/first").write_text("first")
    whole = tmp_path / "whole.tar.gz"
    with tarfile.open(whole, "w:gz") as archive:
        archive.add(tmp_path / "a", "a")
    half = tmp_path / "half.tar.gz"
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    unpack = ["sh", "-c", script("unpack.yml", "Unpack")]
    for archive_path, there in ((half, False), (whole, True)):
        environment = {"SOURCE": str(archive_path), "INTO": "source", "PATH": "/usr/bin:/bin"}
        done = subprocess.run(unpack, cwd=tmp_path, env=environment, capture_output=True, check=False)
        assert (done.returncode == 0) == (tmp_path / "source").exists() == there
    assert (tmp_path / "source/vendor/file").read_bytes() == (tmp_path / "a/vendor/file").read_bytes()
