"""Whether a context fits into this host's memory, before llama.cpp tries."""

from __future__ import annotations

import math
import re

from llamaherd_server.protocol import EngineSettings
from llamaherd_server.worker.available import available_bytes
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
LEAST_PERIOD = 2  # of the layers with a sliding window, where the GGUF states none, at least each second one


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
    """Over all layers and cells: KV heads x (key width x its bytes + value width x its bytes).

    Layers with a sliding window keep that of each sequence and a ubatch.
    """
    lib, handle = model.lib, model.handle
    width = lib.llama_model_n_embd(handle) // max(lib.llama_model_n_head(handle), 1)
    key = model.number("attention.key_length") or width
    value = model.number("attention.value_length") or width
    cell = key * ELEMENT_BYTES[settings.kv_type_k] + value * ELEMENT_BYTES[settings.kv_type_v]
    cells = _padded_cells(settings)
    sliding = (1 - 1 / (model.number("attention.sliding_window_pattern") or LEAST_PERIOD)) if model.window else 0
    sequences = settings.parallel
    in_window = min(cells, model.window * sequences + settings.ubatch * (1 if settings.kv_unified else sequences))
    return float(_kv_heads(model) * cell * (sliding * in_window + (1 - sliding) * cells))


def _kv_heads(model: Model) -> float:
    """KV heads of all layers. A hybrid model's layers differ; llama.cpp cuts a long list off."""
    layers = int(model.lib.llama_model_n_layer(model.handle))
    listed = re.findall(r"\d+(?=[,\]])", model.meta(f"{model.meta('general.architecture')}.attention.head_count_kv"))
    heads = [int(one) for one in listed] or [int(model.lib.llama_model_n_head_kv(model.handle))]
    return layers * sum(heads) / len(heads)


def compute_bytes(model: Model, settings: EngineSettings) -> float:
    """llama.cpp's buffers: an estimate from above of one layer's tensors for a ubatch, and of its logits."""
    lib, handle = model.lib, model.handle
    embedding = lib.llama_model_n_embd(handle)
    activations = 4 * settings.ubatch * (6 * embedding + 2 * (model.number("feed_forward_length") or 4 * embedding))
    cells = _padded_cells(settings) if settings.kv_unified else _padded(settings.ctx_per_slot)
    heads = lib.llama_model_n_head(handle) if settings.flash_attention == "off" else 1
    attention = 4 * settings.ubatch * cells * heads
    return float(activations + attention + 4 * settings.parallel * model.n_vocab)


def _padded_cells(settings: EngineSettings) -> int:
    if settings.kv_unified:
        return _padded(total_cells(settings))
    return settings.parallel * _padded(settings.ctx_per_slot)


def _padded(tokens: int) -> int:
    return math.ceil(tokens / PADDING) * PADDING
