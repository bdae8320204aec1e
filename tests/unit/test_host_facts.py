"""What host_facts makes of NVIDIA's programs, as they answer on hosts with cards; here they are scripts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

MISMATCH = "Failed to initialize NVML: Driver/library version mismatch"
TABLE = "Sat Nov 28 04:00:54 2026\n| NVIDIA-SMI 570.86.15   Driver Version: 570.86.15   {version} |"
Facts = Callable[..., dict[str, Any]]


def program(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def facts(host_facts: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Facts:
    """facts(table, csv, nvcc...): what is told where nvidia-smi prints these, with these nvcc (place=version)."""

    def told(table: str = TABLE.format(version="CUDA Version: 12.8"), csv: str = "", **nvcc: str) -> dict[str, Any]:
        program(tmp_path / "bin/nvidia-smi", f"[ $# -gt 0 ] && printf '{csv}' || printf '{table}'")
        for folder, version in nvcc.items():
            place = tmp_path / ("bin" if folder == "path" else f"local/{folder.replace('_', '.')}/bin")
            program(place / "nvcc", f"echo 'Cuda compilation tools, release {version}, V{version}.1'")
        monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
        monkeypatch.setattr(host_facts, "_LOCAL", tmp_path / "local")
        return {"gpus": host_facts.gpus(), **host_facts.cuda()}

    return told


def test_cards_are_told_with_cmakes_names(facts: Facts) -> None:
    h100 = "NVIDIA H100 80GB HBM3, 9.0, 81559, 570.86.15"
    assert facts(csv=f"{h100}\\n{h100}\\n")["gpus"] == 2 * [
        {"name": "NVIDIA H100 80GB HBM3", "architecture": "90", "memory_bytes": 81559 << 20, "driver": "570.86.15"}
    ]


def test_a_card_without_memory_of_its_own_has_the_hosts(facts: Facts, host_facts: ModuleType) -> None:
    [card] = facts(csv="NVIDIA GB10, 12.1, [N/A], 580.95.05\\n")["gpus"]
    assert (card["architecture"], card["memory_bytes"]) == ("121", host_facts.memory_bytes())


def test_a_driver_that_knows_no_capabilities_tells_no_card(facts: Facts) -> None:
    assert facts(csv='Field "compute_cap" is not a valid field to query.\\n')["gpus"] == []


@pytest.mark.parametrize(
    ("table", "driver", "complaint"),
    [
        (TABLE.format(version="CUDA Version: 12.8"), "12.8", ""),
        (TABLE.format(version="CUDA UMD Version: 13.1"), "13.1", ""),
        (TABLE.format(version="CUDA Version: N/A"), "", "its driver has no libcuda"),
        (f"{MISMATCH}\nNVML library version: 570.86", "", MISMATCH),
        ("", "", ""),
    ],
)
def test_what_the_driver_says(facts: Facts, table: str, driver: str, complaint: str) -> None:
    found = facts(table)
    assert (found["driver"], found["complaint"]) == (driver, complaint)


def test_a_card_that_has_fallen_off_does_not_hang_the_play(
    host_facts: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "nvidia-smi", "exec sleep 60")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(host_facts, "_PATIENCE_S", 0.1)
    assert host_facts.cuda()["complaint"] == "nvidia-smi does not answer"


@pytest.mark.parametrize(
    ("nvcc", "chosen"),
    [
        ({}, ""),
        ({"path": "12.4"}, "12.4"),
        ({"path": "11.8", "cuda-12_4": "12.4"}, "11.8"),
        ({"path": "13.0", "cuda-12_4": "12.4"}, "12.4"),
        ({"cuda-9_2": "9.2", "cuda-12_8": "12.8", "cuda-12_10": "12.10", "cuda-13_0": "13.0"}, "12.10"),
        ({"cuda-13_0": "13.0"}, "13.0"),
    ],
    ids=str,
)
def test_of_several_toolkits_the_driver_can_run_the_one_chosen(facts: Facts, nvcc: dict[str, str], chosen: str) -> None:
    found = facts(**nvcc)
    assert found["toolkit"] == chosen
    assert bool(found["nvcc"]) == bool(chosen)


@pytest.mark.parametrize(
    ("gpus", "reason", "memory"),
    [
        ({"renderD128": ("0x1002", "samsung", 24 << 30)}, "an AMD GPU ({}/renderD128)", 24 << 30),
        ({"renderD128": ("0x1002", "unknown", 512 << 20)}, "an AMD GPU ({}/renderD128)", 0),  # the host's memory
        ({"renderD128": ("0x1002", "", 512 << 20)}, "an AMD GPU ({}/renderD128)", 0),
        ({"renderD128": ("0x1af4", "", 0), "renderD129": ("0x8086", "", 0)}, "an Intel GPU ({}/renderD129)", 0),
        ({"renderD128": ("0x10de", "", 0)}, "", 0),
        ({"renderD128": ("", "", 0)}, "", 0),
        ({}, "", 0),
    ],
    ids=str,
)
def test_vulkan_is_for_gpus_with_a_render_node(
    host_facts: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: dict[str, tuple[str, str, int]],
    reason: str,
    memory: int,
) -> None:
    for name, (vendor, maker, total) in gpus.items():
        (tmp_path / "dri").mkdir(exist_ok=True)
        (tmp_path / "dri" / name).touch()
        device = tmp_path / "drm" / name / "device"
        device.mkdir(parents=True)
        for file, text in (("vendor", vendor), ("mem_info_vram_vendor", maker), ("mem_info_vram_total", total)):
            if text:
                (device / file).write_text(f"{text}\n")
    monkeypatch.setattr(host_facts, "_DRI", tmp_path / "dri")
    monkeypatch.setattr(host_facts, "_DRM", tmp_path / "drm")
    found = host_facts.accelerator([])
    assert found["accelerator"] == ("vulkan" if reason else "cpu")
    assert found["accelerator_memory_bytes"] == memory
    assert not reason or found["accelerator_reason"] == reason.format(tmp_path / "dri")


def test_the_headers_of_vulkan_have_a_version(
    host_facts: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_facts, "_VULKAN_HEADER", tmp_path / "vulkan_core.h")
    assert host_facts.vulkan_headers() == ""
    (tmp_path / "vulkan_core.h").write_text(
        "#define VK_HEADER_VERSION 309\n\n// Complete version of this file\n"
        "#define VK_HEADER_VERSION_COMPLETE VK_MAKE_API_VERSION(0, 1, 4, VK_HEADER_VERSION)\n"
    )
    assert host_facts.vulkan_headers() == "1.4.309"


def test_packages_are_those_that_dpkg_has(host_facts: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    status = (
        "Package: nginx\nStatus: install ok installed\nPriority: optional\n\n"
        "Package: gone\nStatus: deinstall ok config-files\n\nPackage: held\nStatus: hold ok installed\n\n"
    )
    monkeypatch.setattr(host_facts, "_read", {"/var/lib/dpkg/status": status}.get)
    assert host_facts.installed(["nginx", "gone", "held", "never"]) == ["held", "nginx"]
