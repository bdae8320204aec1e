"""The front end's part of the prompt cache: memory that outlives a worker, and a folder that outlives the server."""

from __future__ import annotations

import asyncio
import math
import os
from dataclasses import dataclass
from pathlib import Path

import structlog

from llamaherd_server.wire.protocol import PromptStore
from llamaherd_server.worker import arena
from llamaherd_server.worker.available import available_bytes
from llamaherd_server.worker.prompt_files import store

log = structlog.get_logger()

MIB = 2**20
DEFAULT_MIB = 8192  # llama-server's default
DEFAULT_SHARE = 0.25  # of the available memory: upper limit of the default
STORE_S = 10.0


@dataclass
class Prompts:
    """The memory and the folder that a worker gets. `fd` is -1 if prompts are not kept."""

    fd: int = -1
    bytes: int = 0
    folder: Path | None = None

    @property
    def config(self) -> PromptStore | None:
        if self.fd < 0:
            return None
        return PromptStore(fd=self.fd, bytes=self.bytes, folder=None if self.folder is None else str(self.folder))

    async def close(self) -> None:
        """Write the prompts to the folder, if there is one, and release the memory."""
        if self.fd < 0:
            return
        fd, self.fd = self.fd, -1
        try:
            if self.folder:
                await asyncio.to_thread(store, arena.Arena(fd, self.bytes), self.folder, self.bytes, STORE_S)
        except OSError as error:
            log.warning("prompts are not kept over the restart", folder=str(self.folder), error=error.strerror)
        finally:
            os.close(fd)


def open_prompts(mib: int | None, share: float, folder: Path | None) -> Prompts:
    """Allocate `mib` MiB for prompts (0: none; None: this model's `share` of the host's default) and open the folder.

    If the memory or the folder is unavailable, this logs one line and the server runs without it.
    """
    available = available_bytes()
    size = int(share * min(DEFAULT_MIB * MIB, DEFAULT_SHARE * available if available else math.inf))
    if mib is not None:
        size = mib * MIB
        if available and size > available:
            log.warning(
                f"limits.prompt_cache_mib {mib} exceeds the {available / MIB:.0f} MiB of available memory: "
                "prompts are not kept beyond their slots; lower it"
            )
            return Prompts()
    if not size:
        return Prompts()
    if folder and (why := _unusable(folder)):
        log.warning(f"limits.prompt_cache_dir {folder}: {why}: prompts are not kept over a restart")
        folder = None
    try:
        return Prompts(arena.create(size), size, folder)
    except OSError as error:
        log.warning("prompts are not kept beyond their slots", error=error.strerror)
        return Prompts()


def _unusable(folder: Path) -> str | None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        return error.strerror
    if folder.stat().st_uid != os.geteuid():
        return "it is owned by another user"
    return None if os.access(folder, os.R_OK | os.W_OK | os.X_OK) else "it is not writable"
