"""Asks, before a llama-server is started, whether there is memory for it."""

from __future__ import annotations

import importlib.util

import structlog

from llamaherd_server.engine.asking import REFUSED, asked
from llamaherd_server.wire.errors import EngineError
from llamaherd_server.wire.protocol import NativeConfig

log = structlog.get_logger()


async def check_room(config: NativeConfig, beside: NativeConfig | None = None) -> None:
    """Raises EngineError with the numbers where there is too little memory, once the process of `beside` has ended.

    Prebuilt archives of llama.cpp come without the binding that reads a model: there nothing is asked, nor where other
    hosts hold a part of it.
    """
    if config.rpc or importlib.util.find_spec("llama_cpp") is None:
        return
    code, output = await asked("room", *(one for one in (config, beside) if one))
    if code == REFUSED:
        raise EngineError("does_not_fit", output.decode())
    if code:
        # what cannot be asked is llama-server's to find out
        log.warning("it is not known whether the model fits into memory", exit_code=code)
