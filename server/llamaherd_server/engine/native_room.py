"""Asks, before a llama-server is started, whether there is memory for it."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from contextlib import suppress

import msgspec
import structlog

from llamaherd_server.wire.errors import EngineError
from llamaherd_server.wire.protocol import NativeConfig

log = structlog.get_logger()

# worker.room.REFUSED; the front end does not import what loads libllama.
_REFUSED = 3
_TIMEOUT_S = 60.0


async def check_room(config: NativeConfig, beside: NativeConfig | None = None) -> None:
    """Raises EngineError with the numbers where there is too little memory, once the process of `beside` has ended.

    Prebuilt archives of llama.cpp come without the binding that reads a model: there nothing is asked, nor where other
    hosts hold a part of it.
    """
    if config.rpc or importlib.util.find_spec("llama_cpp") is None:
        return
    configs = [msgspec.json.encode(one).decode() for one in (config, beside) if one]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "llamaherd_server.worker.room", *configs),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            told, _ = await process.communicate()
    except TimeoutError:
        told = b""
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    if process.returncode == _REFUSED:
        raise EngineError("does_not_fit", told.decode())
    if process.returncode:
        # what cannot be asked is llama-server's to find out
        log.warning("it is not known whether the model fits into memory", exit_code=process.returncode)
