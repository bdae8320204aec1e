"""Filters of the llamaherd roles."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def tree_hash(root: str) -> str:
    """The sha256 of all files under `root` with their relative names, less what tools leave behind."""
    found = hashlib.sha256()
    base = Path(root)
    for path in sorted(base.rglob("*")):
        parts = path.relative_to(base).parts
        if path.is_file() and "__pycache__" not in parts and not any(part.startswith(".") for part in parts):
            found.update(f"{'/'.join(parts)}\0{path.stat().st_size}\0".encode())
            found.update(path.read_bytes())
    return found.hexdigest()


def to_toml(table: Mapping[str, Any]) -> str:
    """The lines of one flat TOML table: strings, numbers and booleans. JSON writes them as TOML does, but for DEL."""
    lines = (f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items())
    return "\n".join(lines).replace("\x7f", "\\u007f")


def gib(size: float) -> str:
    """Bytes as a person reads them: `1.5 GiB`."""
    return f"{size / 2**30:.2f} GiB"


def shell_split(line: str) -> list[str]:
    """The words of a shell command line."""
    return shlex.split(line)


def gpu_layers(log: str) -> int:
    """How many layers llama.cpp's log says that it put on an accelerator; 0 where it says nothing of it."""
    found = re.findall(r"offloaded (\d+)/\d+ layers to GPU", log)
    return int(found[-1]) if found else 0


# The CUDA toolkits that know an architecture: from this version on, and before that one.
# https://docs.nvidia.com/cuda/cuda-toolkit-release-notes (architectures added and removed)
_TOOLKITS = {
    **dict.fromkeys(("50", "52", "60", "61", "70"), ("0", "13")),
    "75": ("10", ""),
    "80": ("11", ""),
    "86": ("11.1", ""),
    "89": ("11.8", ""),
    "90": ("11.8", ""),
    "100": ("12.8", ""),
    "120": ("12.8", ""),
    "121": ("12.9", ""),
}


def cuda_mistakes(facts: Mapping[str, Any], architectures: str) -> list[str]:
    """Why this host's driver, its CUDA toolkit and its GPUs do not go together, one line each.

    `facts` is ansible_facts.llamaherd, `architectures` is llamaherd_llama_cpp_cuda_architectures. A toolkit that is not
    there yet is no mistake. A driver runs what any toolkit of its own major version made, and of the ones before:
    https://docs.nvidia.com/deploy/cuda-compatibility
    """
    driver, toolkit = facts["cuda"]["driver"], facts["cuda"]["toolkit"]
    if not driver:
        return ["there is an NVIDIA device but no driver; install it, or set llamaherd_accelerator to cpu"]
    if not toolkit:
        return []
    found = []
    if _number(toolkit)[0] > _number(driver)[0]:
        release = next((gpu["driver"] for gpu in facts["gpus"]), "")
        found.append(
            f"nvcc is of CUDA {toolkit}, the driver {release} runs CUDA {driver} at most; install a newer driver, "
            "or an older toolkit through llamaherd_llama_cpp_cuda_packages"
        )
    there = [gpu["architecture"] for gpu in facts["gpus"]] if architectures == "native" else architectures.split(";")
    for one in sorted(set(there)):
        first, gone = _TOOLKITS.get(re.sub(r"[a-z-].*", "", one), ("", ""))
        if first and _number(toolkit) < _number(first):
            found.append(f"CUDA architecture {one} needs a toolkit of {first} or newer, nvcc is of {toolkit}")
        elif gone and _number(toolkit) >= _number(gone):
            found.append(f"CUDA architecture {one} needs a toolkit older than {gone}, nvcc is of {toolkit}")
    return found


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def table(rows: Sequence[Sequence[Any]]) -> list[str]:
    """The rows as lines, their columns aligned. All rows are equally long."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {
            "tree_hash": tree_hash,
            "to_toml": to_toml,
            "gib": gib,
            "shell_split": shell_split,
            "cuda_mistakes": cuda_mistakes,
            "gpu_layers": gpu_layers,
            "table": table,
        }
