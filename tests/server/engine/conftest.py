"""An engine with the real model, one for each module that shares it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest_asyncio

from llamaherd_server.engine.embedded import EmbeddedEngine
from llamaherd_server.wire.engine_settings import EngineSettings

from ..conftest import required

# One thread: two that wait for each other crawl on a machine that is busy with something else.
SETTINGS = EngineSettings(parallel=4, ctx_per_slot=512, batch=512, ubatch=128, threads=1)


@asynccontextmanager
async def running(
    settings: EngineSettings = SETTINGS, heartbeat_timeout_s: float = 120, path: Path | None = None, **more: Any
) -> AsyncIterator[EmbeddedEngine]:
    path = path or Path(required("LLAMAHERD_TEST_MODEL"))
    engine = EmbeddedEngine(path, settings, heartbeat_timeout_s=heartbeat_timeout_s, **more)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def computing(engine: EmbeddedEngine, cpu_s: float = 0.2) -> None:
    """Wait until the worker has computed for so long from now on: a step that is in progress shows in nothing else."""
    began = _cpu_s(engine)
    while _cpu_s(engine) < began + cpu_s:
        await asyncio.sleep(0.01)


def _cpu_s(engine: EmbeddedEngine) -> float:
    fields = Path(f"/proc/{engine.status().pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[EmbeddedEngine]:
    async with running() as started:
        yield started
