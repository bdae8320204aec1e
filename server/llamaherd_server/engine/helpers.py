"""Runs modules of worker/ that use libllama in short-lived processes, because the front end does not load libllama."""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress

import msgspec

# Exit code of a refusal; standard output then holds the reason.
REFUSED = 3
_TIMEOUT_S = 60.0


async def run_helper(module: str, *configs: msgspec.Struct) -> tuple[int, bytes]:
    """Run `worker.<module>` and return its exit code and standard output, which is empty after a timeout."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"llamaherd_server.worker.{module}"),
        *(msgspec.json.encode(config).decode() for config in configs),
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
