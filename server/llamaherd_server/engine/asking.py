"""Asks a module of worker/ what libllama knows of a model, in a process of its own: the front end does not load it."""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress

import msgspec

# What such a process ends with where the answer is a refusal, whose reason is its output.
REFUSED = 3
_TIMEOUT_S = 60.0


async def asked(module: str, *configs: msgspec.Struct) -> tuple[int, bytes]:
    """Its exit code and what it wrote to standard output; nothing where it took longer than a minute."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"llamaherd_server.worker.{module}"),
        *(msgspec.json.encode(one).decode() for one in configs),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
    )
    output = b""
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            output, _ = await process.communicate()
    except TimeoutError:
        pass
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    return process.returncode or 0, output
