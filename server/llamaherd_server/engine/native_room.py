"""Checks before the start of a llama-server whether it fits into memory."""

from __future__ import annotations

import importlib.util

import structlog

from llamaherd_server.engine.helpers import REFUSED, run_helper
from llamaherd_server.wire.errors import EngineError
from llamaherd_server.wire.protocol import NativeConfig

log = structlog.get_logger()


async def check_room(config: NativeConfig, beside: NativeConfig | None = None) -> None:
    """Raise EngineError with the figures if there is too little memory, counting what the process of `beside` frees.

    The check is skipped without llama-cpp-python, which reads the model and which prebuilt archives of llama.cpp lack,
    and for models that are partly on other hosts (`rpc`).
    """
    if config.rpc or importlib.util.find_spec("llama_cpp") is None:
        return
    code, output = await run_helper("room", *(one for one in (config, beside) if one))
    if code == REFUSED:
        raise EngineError("does_not_fit", output.decode())
    if code:
        # the check itself failed: leave it to llama-server
        log.warning("memory check failed, starting without it", exit_code=code)
