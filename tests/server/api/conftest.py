"""The app over an engine double, served by uvicorn on a loopback port: streams and disconnects are real ones."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from llamaherd_server.api.state import AppState
from llamaherd_server.app import create_app
from llamaherd_server.settings import Settings

from .double import Double


@dataclass(frozen=True)
class Served:
    """A client of the app, and the parts behind it."""

    http: httpx.AsyncClient
    state: AppState
    server: uvicorn.Server

    async def chat(self, **fields: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": "x"}], **fields}
        return await self.http.post("/v1/chat/completions", json=body)


Serve = Callable[..., AbstractAsyncContextManager[Served]]


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """serve(double, keys="…toml…", max_queue=…) gives a client of the app over that double."""
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")

    @asynccontextmanager
    async def serving(
        double: Double, keys: str | None = None, http: dict[str, Any] | None = None, **limits: Any
    ) -> AsyncIterator[Served]:
        table: dict[str, Any] = {"model": {"name": "double", "path": model}, "limits": limits, "http": http or {}}
        table["engine"] = {"parallel": double.settings.parallel}
        if keys is not None:
            (tmp_path / "keys.toml").write_text(keys)
            table["auth"] = {"keys_file": tmp_path / "keys.toml"}
        app = create_app(Settings.model_validate(table), double)
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=5))
        state: AppState = app.state.llamaherd
        state.lifecycle.over = lambda: setattr(server, "should_exit", True)
        task = asyncio.create_task(server._serve([listener]))
        try:
            while not server.started:
                await asyncio.sleep(0.005)
            async with httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=20
            ) as client:
                yield Served(client, state, server)
        finally:
            server.should_exit = True
            await task

    return serving


async def until(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds; the test's own timeout ends a wait in vain."""
    while not condition():
        await asyncio.sleep(0.005)
