"""Filters of the llamaherd roles."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible_collections.llamaherd.llamaherd.plugins.module_utils import setting_rules as rules


def tree_hash(root: str) -> str:
    """Return the sha256 of the relative names and contents of all files under `root`, except hidden and cache files."""
    found = hashlib.sha256()
    base = Path(root)
    for path in sorted(base.rglob("*")):
        parts = path.relative_to(base).parts
        if path.is_file() and "__pycache__" not in parts and not any(part.startswith(".") for part in parts):
            found.update(f"{'/'.join(parts)}\0{path.stat().st_size}\0".encode())
            found.update(path.read_bytes())
    return found.hexdigest()


def to_toml(table: Mapping[str, Any]) -> str:
    """Return the lines of a flat TOML table of scalars and lists. Their JSON is valid TOML, except for DEL."""
    lines = (f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items())
    return "\n".join(lines).replace("\x7f", "\\u007f")


def gib(size: float) -> str:
    """Format a number of bytes, as in `1.50 GiB`."""
    return f"{size / 2**30:.2f} GiB"


def shell_split(line: str) -> list[str]:
    """Split a shell command line into words."""
    return shlex.split(line)


def server_instances(more: Sequence[Mapping[str, Any]], first: Mapping[str, Any]) -> list[Any]:
    """Return a host's server instances: `first` and those of llamaherd_instances, each with its number and unit."""
    return [
        {"settings": {}, "devices": "", **one, "number": number, "suffix": suffix, "unit": f"llamaherd-server{suffix}"}
        for number, one in enumerate((first, *more))
        for suffix in [f"-{one['name']}" if "name" in one else ""]
    ]


def instance_mistakes(instances: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the mistakes in a host's `server_instances`, one line each."""
    found = [
        f"llamaherd_instances: the name {one['name']!r} may have small letters, digits and - only"
        for one in instances[1:]
        if not re.fullmatch("[a-z0-9-]+", one["name"])
    ]
    for key in ("unit", "port"):
        values = [one[key] for one in instances]
        found += [
            f"llamaherd_instances: the {key} {value} is given twice"
            for value in dict.fromkeys(values)
            if values.count(value) > 1
        ]
    return found


_META = Path(__file__).resolve().parents[2] / "meta"
_SCHEMA = json.loads((_META / "engine_settings.json").read_text())
_PLACEMENT_SCHEMA = json.loads((_META / "placement.json").read_text())


def setting_mistakes(served: Sequence[Mapping[str, Any]], instances: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the mistakes for which the server would reject settings or placement, one line each.

    `served` are `served_models`, `instances` are `server_instances`.
    """
    placed = [
        f"model {model['name']}: {mistake}"
        for model in served
        for mistake in rules.placement_mistakes(model["placement"], _PLACEMENT_SCHEMA)
    ]
    asked = [(f"model {model['name']}", model["settings"]) for model in served]
    asked += [(one["unit"], {**served[0]["settings"], **one["settings"]}) for one in instances if one["settings"]]
    return placed + [
        f"{who}: {mistake}" for who, settings in asked for mistake in rules.setting_mistakes(settings, _SCHEMA)
    ]


def rpc_mistakes(own: Mapping[str, Any], group: Sequence[str], inference: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return why a host cannot use, or be, a worker of llama.cpp's RPC backend, one line each.

    `own` has the host's name (host), address, workers, engines and instances; `group` is the group rpc, `inference` has
    the variables of all inference hosts. A worker serves one connection at a time, so a second host would wait.
    """
    host, workers, found = own["host"], own["workers"], []
    if not _is_private(own["address"]):
        found.append(
            f"llamaherd_rpc_address of {host} is {own['address']!r}, not an IPv4 address of a private network; the RPC "
            "backend has neither encryption nor authentication: set an address in a network of its own"
        )
    if strangers := [name for name in workers if name not in group]:
        found.append(f"llamaherd_rpc_workers has {', '.join(strangers)}, not in the group rpc; put each worker into it")
    if workers and list(own["engines"]).count("llama-server") != 1:
        found.append("llamaherd_rpc_workers needs one model on the engine llama-server: set llamaherd_engine")
    if workers and own["instances"] > 1:
        found.append("llamaherd_rpc_workers needs a host with one instance: leave llamaherd_instances empty")
    asking = [(one["inventory_hostname"], one.get("llamaherd_rpc_workers", ())) for one in inference]
    for name in dict.fromkeys((*workers, host)):
        users = [user for user, asked in asking if name in asked]
        if len(users) > 1:
            found.append(f"{name} is an RPC worker of {' and '.join(users)}: it can work for one of them only")
    return found


def _is_private(address: str) -> bool:
    try:
        found = ipaddress.IPv4Address(address)
    except ValueError:
        return False
    return not (found.is_global or found.is_unspecified or found.is_multicast)


def gpu_layers(log: str) -> int:
    """Return the number of layers on an accelerator according to llama.cpp's log; 0 if the log does not mention it."""
    found = re.findall(r"offloaded (\d+)/\d+ layers to GPU", log)
    return int(found[-1]) if found else 0


# CUDA toolkits that support an architecture: from the first version on, and before the second.
# https://docs.nvidia.com/cuda/cuda-toolkit-release-notes (architectures added and removed)
_TOOLKITS = {
    **dict.fromkeys(("50", "52", "60", "61", "70"), ("0", "13")),
    "75": ("10", ""),
    "80": ("11", ""),
    "86": ("11.1", ""),
    "87": ("11.4", ""),
    "89": ("11.8", ""),
    "90": ("11.8", ""),
    "100": ("12.8", ""),
    "103": ("12.9", ""),
    "110": ("13", ""),
    "120": ("12.8", ""),
    "121": ("12.9", ""),
}


def cuda_mistakes(facts: Mapping[str, Any], architectures: str) -> list[str]:
    """Return why this host's driver, CUDA toolkit and GPUs are incompatible, one line each.

    `facts` is ansible_facts.llamaherd, `architectures` is llamaherd_llama_cpp_cuda_architectures. A missing toolkit is
    not a mistake. A driver runs programs of toolkits of its own and of earlier major versions:
    https://docs.nvidia.com/deploy/cuda-compatibility
    """
    driver, toolkit = facts["cuda"]["driver"], facts["cuda"]["toolkit"]
    if complaint := facts["cuda"]["complaint"]:
        return [f"nvidia-smi says: {complaint}; fix the driver (updated: reboot), or set llamaherd_accelerator to cpu"]
    if not driver:
        return ["there is an NVIDIA device but no driver; install it, or set llamaherd_accelerator to cpu"]
    if not facts["gpus"]:
        return ["nvidia-smi reports no compute capability; install driver 510 or newer"]
    if not toolkit:
        return []
    found = []
    if _number(toolkit)[0] > _number(driver)[0]:
        release = next((gpu["driver"] for gpu in facts["gpus"]), "")
        found.append(
            f"nvcc is of CUDA {toolkit}, the driver {release} runs CUDA {driver} at most; install a newer driver, "
            "or an older toolkit beside it (what a host without one gets is in llamaherd_llama_cpp_cuda_packages)"
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
    """Format rows of equal length as lines with aligned columns."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {
            "tree_hash": tree_hash,
            "to_toml": to_toml,
            "setting_mistakes": setting_mistakes,
            "server_instances": server_instances,
            "instance_mistakes": instance_mistakes,
            "gib": gib,
            "shell_split": shell_split,
            "cuda_mistakes": cuda_mistakes,
            "rpc_mistakes": rpc_mistakes,
            "gpu_layers": gpu_layers,
            "table": table,
        }
