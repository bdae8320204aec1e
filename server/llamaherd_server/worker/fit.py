"""Resolves `gpu_layers: auto` to the placement that `llama-fit-params` of the same llama.cpp build computes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from msgspec.structs import replace

from llamaherd_server.wire.engine_settings import EngineSettings, Placement
from llamaherd_server.worker.weights import ModelError

PROGRAM = "llama-fit-params"
_TIMEOUT_S = 600.0  # it reads the header and creates contexts without allocating memory
_RESULT = re.compile(r'^-c \d+ -ngl (-?\d+)(?: -ts (\S+))?(?: -ot "(.*)")?$', re.MULTILINE)
_COMPLAINT = re.compile(r"^[\d.]+ [WE] (.*)$", re.MULTILINE)  # a warning or an error


class Fit(NamedTuple):
    """`overrides`: pairs of a tensor name pattern and the buffer type for matching tensors, regardless of layer."""

    placement: Placement
    overrides: list[tuple[str, str]]


def context_arguments(settings: EngineSettings) -> dict[str, object]:
    """llama.cpp's flags for the settings that determine a context's memory."""
    context = settings.parallel * settings.ctx_per_slot
    return {
        "--parallel": settings.parallel,
        "--ctx-size": (settings.kv_cells or context) if settings.kv_unified else context,
        "--batch-size": settings.batch,
        "--ubatch-size": settings.ubatch,
        "--cache-type-k": settings.kv_type_k,
        "--cache-type-v": settings.kv_type_v,
        "--flash-attn": settings.flash_attention,
    }


def fitted(lib: Any, path: str, placement: Placement, settings: EngineSettings) -> Fit:
    """`placement` with `auto` replaced by as many layers as fit into the devices' free memory, leaving 1 GiB.

    Raises ModelError.
    """
    if placement.gpu_layers != "auto":
        return Fit(placement, [])
    if not lib.llama_supports_gpu_offload():
        return Fit(replace(placement, gpu_layers=0), [])
    program = Path(lib._lib._name).resolve().parent / PROGRAM
    if not program.exists():
        remedy = f"add {PROGRAM} to llamaherd_llama_cpp_targets and deploy, or set gpu_layers to a number"
        raise ModelError(f"gpu_layers auto needs {program}, which this build lacks: {remedy}")
    arguments = {
        "--model": path,
        **context_arguments(settings),
        "--split-mode": placement.split_mode,
        "--main-gpu": placement.main_gpu,
        **({"--device": ",".join(placement.devices)} if placement.devices else {}),
    }
    command = [str(program), *(str(word) for pair in arguments.items() for word in pair), "--offline"]
    try:
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise ModelError(f"gpu_layers auto: {PROGRAM} took over {_TIMEOUT_S:.0f} s: set it to a number") from None
    found = _RESULT.search(ended.stdout)
    if ended.returncode or not found:
        why = [*_COMPLAINT.findall(ended.stderr), *ended.stderr.splitlines(), f"exit code {ended.returncode}"]
        raise ModelError(f"gpu_layers auto: {PROGRAM} found no placement for {path}: {why[0]}")
    layers, shares, patterns = found.groups(default="")
    overrides = [one.rsplit("=", 1) for one in patterns.split(",") if one]
    placed = replace(placement, gpu_layers=int(layers), tensor_split=[float(one) for one in shares.split(",") if one])
    return Fit(placed, [(pattern, buffer) for pattern, buffer in overrides])
