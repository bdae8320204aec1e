"""Chooses the context length if the settings do not fix it, once, before the engine is created."""

from __future__ import annotations

import math

import msgspec
import structlog

from llamaherd_server.config.settings import Settings
from llamaherd_server.gguf import MIN_CTX, GgufError, part_paths, read_header, shape, with_context
from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.worker.available import total_bytes

log = structlog.get_logger()

MIB = 2**20


def with_context_length(settings: Settings, among: int) -> EngineSettings:
    """Return the engine settings with `ctx_per_slot` filled in; `among` models share the host's memory."""
    given = settings.engine.settings
    if given.ctx_per_slot:
        return given
    model = settings.model
    files = part_paths(model.path)
    memory = model.memory_mib * MIB if model.memory_mib else (total_bytes() or math.inf) / among
    try:
        model_shape = shape(read_header(files[0]))
    except GgufError:  # llama.cpp may still be able to load it
        return msgspec.structs.replace(given, ctx_per_slot=MIN_CTX)
    others = [file for path in (model.mmproj, model.draft) if path for file in part_paths(path)]
    available = memory - sum(file.stat().st_size for file in (*files, *others))
    found = msgspec.convert(with_context(model_shape, msgspec.to_builtins(given), available), EngineSettings)
    figures = {"ctx_per_slot": found.ctx_per_slot, "kv_cells": found.kv_cells, "trained": model_shape.n_ctx_train}
    log.info("context length chosen", model=model.name, **figures)
    return found
