"""Checks an engine's settings: the same rules for server.toml, the environment and PUT /admin/engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from llamaherd_server.errors import nearest
from llamaherd_server.wire.protocol import EngineSettings

# llama.cpp's llama_max_parallel_sequences(), and what a 32-bit token position can address.
MAX_PARALLEL = 256
MAX_CONTEXT = 2**31 - 1
MAX_THREADS = 512


def merge(base: EngineSettings, values: Mapping[str, Any]) -> EngineSettings:
    """`base` with `values` put over it; numbers may be strings, as they are in the environment.

    Raises ValueError with one line that names the field, the value and the remedy.
    """
    names = EngineSettings.__struct_fields__
    for name in values:
        if name not in names:
            raise ValueError(f"unknown engine setting {name!r}{nearest(name, names)}")
    try:
        merged = msgspec.convert({**msgspec.to_builtins(base), **values}, EngineSettings, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"engine setting: {error}") from None
    _check(merged)
    return merged


def _check(settings: EngineSettings) -> None:
    _check_range("parallel", settings.parallel, 1, MAX_PARALLEL)
    _check_range("batch", settings.batch, 1, MAX_CONTEXT)
    _check_range("ubatch", settings.ubatch, 1, MAX_CONTEXT)
    _check_range("ctx_per_slot", settings.ctx_per_slot, 16, MAX_CONTEXT)
    _check_range("threads", settings.threads, 0, MAX_THREADS)
    _check_range("threads_batch", settings.threads_batch, 0, MAX_THREADS)
    _check_range("kv_cells", settings.kv_cells, 0, MAX_CONTEXT)
    if settings.ubatch > settings.batch:
        raise ValueError(f"ubatch {settings.ubatch} is larger than batch {settings.batch}: lower ubatch or raise batch")
    if settings.batch < settings.parallel:
        raise ValueError(
            f"batch {settings.batch} is smaller than parallel {settings.parallel}: every running sequence puts one "
            "token into each batch, so batch must be at least parallel"
        )
    if settings.parallel * settings.ctx_per_slot > MAX_CONTEXT:
        raise ValueError(
            f"parallel {settings.parallel} x ctx_per_slot {settings.ctx_per_slot} is more than {MAX_CONTEXT} tokens"
        )
    if settings.flash_attention == "off" and settings.kv_type_v not in ("f32", "f16", "bf16"):
        raise ValueError(
            f'kv_type_v "{settings.kv_type_v}" needs flash attention: set flash_attention to "auto" or "on"'
        )


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} {value} is out of range: it must be between {low} and {high}")
