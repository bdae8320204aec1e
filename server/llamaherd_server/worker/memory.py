"""Whether a context fits into this host's memory, before llama.cpp tries."""

from __future__ import annotations

import math
from pathlib import Path

from llamaherd_server.protocol import EngineSettings
from llamaherd_server.worker.model import Model

# Bytes per element: a block's size over its length.
ELEMENT_BYTES = {
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
}
PADDING = 256  # tokens to which llama.cpp pads a context
MIB = 2**20


class DoesNotFit(Exception):
    """A context with these settings would not fit; the message has the numbers."""


def total_cells(settings: EngineSettings) -> int:
    """KV cells that sequences may use, in tokens."""
    return settings.kv_cells or settings.parallel * settings.ctx_per_slot


def check_fits(model: Model, settings: EngineSettings, *, released: float = 0, needed: float | None = None) -> None:
    """Raises DoesNotFit; `released` bytes are free by the time that the context is built.

    `needed` is its size in bytes where it is not that of a generating context.

    A GPU's memory is not asked here: llama.cpp refuses to build a context that it has no room for.
    """
    if settings.kv_cells and not settings.kv_unified:
        raise DoesNotFit(f"kv_cells {settings.kv_cells} needs a unified KV cache: set kv_unified, or kv_cells 0")
    available = available_bytes()
    if available is None or model.on_gpu:
        return
    available += released
    needed = context_bytes(model, settings) if needed is None else needed
    if needed <= available:
        return
    per_slot_token = kv_bytes(model, settings) / settings.ctx_per_slot
    fits = int((available - compute_bytes(model, settings)) / per_slot_token) // PADDING * PADDING
    remedy = f"ctx_per_slot {fits} would fit" if fits > 0 else "lower parallel or ubatch"
    raise DoesNotFit(
        f"parallel {settings.parallel} x ctx_per_slot {settings.ctx_per_slot} needs {needed / MIB:.0f} MiB, "
        f"{available / MIB:.0f} MiB are available: {remedy}"
    )


def context_bytes(model: Model, settings: EngineSettings) -> float:
    return kv_bytes(model, settings) + compute_bytes(model, settings)


def kv_bytes(model: Model, settings: EngineSettings) -> float:
    """Over all layers and cells: KV heads x (key width x its bytes + value width x its bytes)."""
    lib, handle = model.lib, model.handle
    heads = lib.llama_model_n_head(handle)
    width = lib.llama_model_n_embd(handle) // max(heads, 1)
    key = model.number("attention.key_length") or width
    value = model.number("attention.value_length") or width
    cell = key * ELEMENT_BYTES[settings.kv_type_k] + value * ELEMENT_BYTES[settings.kv_type_v]
    return float(lib.llama_model_n_layer(handle) * lib.llama_model_n_head_kv(handle) * cell * _padded_cells(settings))


def compute_bytes(model: Model, settings: EngineSettings) -> float:
    """llama.cpp's buffers: an estimate from above of one layer's tensors for a ubatch, and of its logits."""
    lib, handle = model.lib, model.handle
    embedding = lib.llama_model_n_embd(handle)
    activations = 4 * settings.ubatch * (6 * embedding + 2 * (model.number("feed_forward_length") or 4 * embedding))
    cells = _padded_cells(settings) if settings.kv_unified else _padded(settings.ctx_per_slot)
    heads = lib.llama_model_n_head(handle) if settings.flash_attention == "off" else 1
    attention = 4 * settings.ubatch * cells * heads
    return float(activations + attention + 4 * settings.parallel * model.n_vocab)


def available_bytes() -> float | None:
    """Memory that this process may still take, by the host and its control groups; None where nobody tells (macOS)."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    lines = meminfo.read_text().splitlines()
    host = next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable:"))
    return min(host, _control_group_bytes())


def _control_group_bytes() -> float:
    """What the tightest control group (version 2) above this process leaves, file cache that can go included."""
    groups = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.removeprefix("0::") for line in groups if line.startswith("0::")), "/")
    left = math.inf
    root = Path("/sys/fs/cgroup")
    folder = root / own.strip("/")
    for group in (folder, *folder.parents):
        limit = group / "memory.max"
        if limit.exists() and (most := limit.read_text().strip()) != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
            left = min(left, int(most) - used)
        if group == root:
            break
    return left


def _padded_cells(settings: EngineSettings) -> int:
    if settings.kv_unified:
        return _padded(total_cells(settings))
    return settings.parallel * _padded(settings.ctx_per_slot)


def _padded(tokens: int) -> int:
    return math.ceil(tokens / PADDING) * PADDING
