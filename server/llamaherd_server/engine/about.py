"""Reads a model's metadata before the model is loaded."""

from __future__ import annotations

import importlib.util

import msgspec
import structlog

from llamaherd_server.config.settings import Settings
from llamaherd_server.engine.helpers import run_helper
from llamaherd_server.gguf import part_paths
from llamaherd_server.wire.protocol import ModelInfo, WorkerConfig

log = structlog.get_logger()


async def read_model_info(settings: Settings) -> ModelInfo | None:
    """Return the model's metadata; None if the file cannot be read or llama-cpp-python is not installed."""
    model = settings.model
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    template = None if model.chat_template is None else str(model.chat_template)
    config = WorkerConfig(
        path=str(part_paths(model.path)[0]), settings=settings.engine.settings, chat_template=template
    )
    code, output = await run_helper("about", config)
    if code:
        log.error("cannot read a model's metadata before it is loaded", model=model.name, error=output.decode())
        return None
    return msgspec.json.decode(output, type=ModelInfo)
