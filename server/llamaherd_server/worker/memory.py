"""Checks whether a context fits into this host's memory, before llama.cpp builds it."""

from __future__ import annotations

from msgspec.structs import asdict

from llamaherd_server.gguf import PADDING, Shape, compute_bytes, kv_bytes, largest
from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.worker.available import available_bytes
from llamaherd_server.worker.model import Model

MIB = 2**20


class DoesNotFit(Exception):
    """A context with these settings does not fit; the message contains the numbers."""


def total_cells(settings: EngineSettings) -> int:
    """KV cells of all sequences together; each holds one token."""
    return settings.kv_cells or settings.parallel * settings.ctx_per_slot


def check_fits(model: Model, settings: EngineSettings, *, released: float = 0, needed: float | None = None) -> None:
    """Raise DoesNotFit unless the context fits into the available memory plus `released` bytes.

    `needed`: the context's size in bytes; None: that of a generating context.

    Does not check GPU memory: llama.cpp itself refuses to build a context that does not fit there.
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
    draft = _draft_bytes(model, settings)
    fits = largest("ctx_per_slot", PADDING, model.shape, asdict(settings), available - draft) if model.shape else 0
    remedy = f"ctx_per_slot {fits} would fit" if fits > 0 else "lower parallel or ubatch"
    raise DoesNotFit(
        f"parallel {settings.parallel} x ctx_per_slot {settings.ctx_per_slot} needs {needed / MIB:.0f} MiB, "
        f"{available / MIB:.0f} MiB are available: {remedy}"
    )


def context_bytes(model: Model, settings: EngineSettings) -> float:
    """Estimated bytes of a context with these settings, including the draft model's if that is used."""
    return _bytes(model.shape, settings) + _draft_bytes(model, settings)


def _draft_bytes(model: Model, settings: EngineSettings) -> float:
    return _bytes(model.draft.shape, settings) if model.draft and settings.speculative == "draft" else 0.0


def _bytes(shape: Shape | None, settings: EngineSettings) -> float:
    """Estimated bytes of KV cache and compute buffers; 0 if the GGUF's header does not give the shape."""
    values = asdict(settings)
    return kv_bytes(shape, values) + compute_bytes(shape, values) if shape else 0.0
