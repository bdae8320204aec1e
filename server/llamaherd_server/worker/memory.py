"""Whether a context fits into this host's memory, before llama.cpp tries."""

from __future__ import annotations

from msgspec.structs import asdict

from llamaherd_server.gguf import PADDING, Shape, compute_bytes, kv_bytes, largest
from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.worker.available import available_bytes
from llamaherd_server.worker.model import Model

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
    beside = _draft_bytes(model, settings)
    fits = largest("ctx_per_slot", PADDING, model.shape, asdict(settings), available - beside) if model.shape else 0
    remedy = f"ctx_per_slot {fits} would fit" if fits > 0 else "lower parallel or ubatch"
    raise DoesNotFit(
        f"parallel {settings.parallel} x ctx_per_slot {settings.ctx_per_slot} needs {needed / MIB:.0f} MiB, "
        f"{available / MIB:.0f} MiB are available: {remedy}"
    )


def context_bytes(model: Model, settings: EngineSettings) -> float:
    """With that of a draft model in use."""
    return _bytes(model.shape, settings) + _draft_bytes(model, settings)


def _draft_bytes(model: Model, settings: EngineSettings) -> float:
    return _bytes(model.draft.shape, settings) if model.draft and settings.speculative == "draft" else 0.0


def _bytes(shape: Shape | None, settings: EngineSettings) -> float:
    """0 for a GGUF whose header does not say."""
    values = asdict(settings)
    return kv_bytes(shape, values) + compute_bytes(shape, values) if shape else 0.0
