"""Loads a GGUF's weights onto the configured devices."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from llamaherd_server.wire.engine_settings import Placement
from llamaherd_server.worker.lib import Log

MAGIC = b"GGUF"
PROGRESS_STEP = 0.05
MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
CPU = "CPU"
_LOAD_MODES = {
    **{"auto": "AUTO", "none": "NONE", "mmap": "MMAP", "mlock": "MLOCK"},
    **{"mmap+mlock": "MMAP_MLOCK", "dio": "DIRECT_IO"},
}
_NUMA = {"off": 0, "distribute": 1, "isolate": 2, "numactl": 3}  # ggml_numa_strategy
# the tensors of a layer's experts, from llama.cpp's common.h
_EXPERTS = r"blk\.{}\.ffn_(up|down|gate|gate_up)_(ch|)exps"


class ModelError(Exception):
    """The model cannot be loaded; the message is one line for the operator."""


class _Override(ctypes.Structure):
    """llama_model_tensor_buft_override"""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def load_weights(
    lib: Any,
    log: Log,
    path: str,
    placement: Placement,
    progress: Callable[[float], None],
    *,
    weights: bool = True,
    mtp: bool = False,
    overrides: Iterable[tuple[str, str]] = (),
) -> Any:
    """Return a llama_model of the GGUF at `path`, with its MTP heads if `mtp`. Raises ModelError.

    Without `weights` it computes nothing. `progress` gets the fraction loaded so far, 0 to 1. `placement.gpu_layers`
    must be a number. `overrides`: pairs of a pattern and the name of the buffer type for tensors that match it.
    """
    if placement.numa != "off":
        lib.llama_numa_init(_NUMA[placement.numa])
    params = lib.llama_model_default_params()
    params.n_gpu_layers = placement.gpu_layers
    params.split_mode = getattr(lib, f"LLAMA_SPLIT_MODE_{placement.split_mode.upper()}")
    params.main_gpu = placement.main_gpu
    params.load_mode = getattr(lib, f"LLAMA_LOAD_MODE_{_LOAD_MODES[placement.load_mode]}")
    # llama.cpp reads these while it loads: the variables keep them alive
    devices = _devices(lib._lib, placement.devices)
    placed = _overrides(lib._lib, [*_experts(placement.cpu_moe_layers), *overrides])
    shares = _shares(placement.tensor_split, lib.LLAMA_MAX_DEVICES)
    params.load_mtp = mtp
    if devices is not None:
        params.devices = ctypes.addressof(devices)
    if placed is not None:
        params.tensor_buft_overrides = ctypes.addressof(placed)
    if shares is not None:
        params.tensor_split = shares
    if not weights:
        params.no_alloc, params.load_mode = True, lib.LLAMA_LOAD_MODE_NONE
    params.progress_callback = report = lib.llama_progress_callback(_every_step(progress))
    handle = lib.llama_model_load_from_file(path.encode(), params)
    del report, devices, placed, shares
    if not handle:
        raise ModelError(f"{path} cannot be loaded: {log.last_error or 'unknown reason'}")
    return handle


def check_magic(path: str) -> None:
    """Raise ModelError unless `path` is a readable file that begins with GGUF's magic bytes."""
    try:
        with Path(path).open("rb") as file:
            magic = file.read(len(MAGIC))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    if magic != MAGIC:
        raise ModelError(f"{path} is not a GGUF file: it begins with {magic!r}, not with {MAGIC!r}")


def _devices(llama: Any, names: list[str]) -> Any:
    """A NULL-terminated array of ggml_backend_dev_t; None: all devices."""
    if not names:
        return None
    llama.ggml_backend_dev_by_name.restype = llama.ggml_backend_dev_get.restype = ctypes.c_void_p
    llama.ggml_backend_dev_name.restype = ctypes.c_char_p
    found = [llama.ggml_backend_dev_by_name(name.encode()) for name in names]
    if None in found:
        everything = [ctypes.c_void_p(llama.ggml_backend_dev_get(i)) for i in range(llama.ggml_backend_dev_count())]
        available = ", ".join(llama.ggml_backend_dev_name(device).decode() for device in everything)
        raise ModelError(f"devices: unknown device {names[found.index(None)]!r}; available: {available}")
    return (ctypes.c_void_p * (len(found) + 1))(*found, None)


def _experts(layers: int) -> list[tuple[str, str]]:
    """Overrides that put the experts of the first `layers` layers into the CPU's memory."""
    return [(_EXPERTS.format(layer), CPU) for layer in range(min(layers, MAX_LAYERS))]


def _overrides(llama: Any, overrides: list[tuple[str, str]]) -> Any:
    """The overrides as llama.cpp expects them; None: nothing is overridden."""
    if not overrides:
        return None
    types = _buffer_types(llama)
    found = [_Override(pattern.encode(), types[buffer]) for pattern, buffer in overrides]
    return (_Override * (len(found) + 1))(*found, _Override(None, None))


def _buffer_types(llama: Any) -> dict[str, int]:
    """The devices' buffer types by name; the CPU's is CPU."""
    llama.ggml_backend_dev_get.restype = llama.ggml_backend_dev_buffer_type.restype = ctypes.c_void_p
    llama.ggml_backend_buft_name.restype = ctypes.c_char_p
    devices = [ctypes.c_void_p(llama.ggml_backend_dev_get(i)) for i in range(llama.ggml_backend_dev_count())]
    types = [llama.ggml_backend_dev_buffer_type(device) for device in devices]
    return {llama.ggml_backend_buft_name(ctypes.c_void_p(one)).decode(): one for one in types if one}


def _shares(tensor_split: list[float], most: int) -> Any:
    """One share for each device that llama.cpp supports; None: split by free memory."""
    if not tensor_split:
        return None
    if len(tensor_split) > most:
        raise ModelError(f"tensor_split has {len(tensor_split)} shares: this llama.cpp supports at most {most}")
    return (ctypes.c_float * most)(*tensor_split)


def _every_step(progress: Callable[[float], None]) -> Callable[[float, Any], bool]:
    """Limit llama.cpp's callbacks, one per tensor, to one per PROGRESS_STEP."""
    shown = -PROGRESS_STEP

    def report(done: float, _user_data: Any) -> bool:
        nonlocal shown
        if done - shown >= PROGRESS_STEP:
            shown = done
            progress(done)
        return True

    return report
