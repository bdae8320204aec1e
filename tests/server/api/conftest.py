"""The app over an engine double, served by uvicorn on a loopback port: streams and disconnects are real ones."""

from __future__ import annotations

import asyncio
import ctypes
import math
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from llamaherd_server.api.state import AppState
from llamaherd_server.app import create_app
from llamaherd_server.config.settings import Settings
from llamaherd_server.http.protocol import Protocol
from llamaherd_server.worker.lib import load
from tests.server.conftest import required

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
        double: Double,
        keys: str | None = None,
        http: dict[str, Any] | None = None,
        aliases: Sequence[str] | None = (),
        sampling: dict[str, Any] | None = None,
        entry: dict[str, Any] | None = None,
        telemetry: dict[str, Any] | None = None,
        **limits: Any,
    ) -> AsyncIterator[Served]:
        named = {"name": "double", "path": model, **({} if aliases is None else {"aliases": [*aliases]})}
        named["sampling"] = sampling or {}
        named |= entry or {}
        named["chat_template_kwargs"] = {"enable_thinking": False}
        table: dict[str, Any] = {"model": named, "limits": limits, "http": http or {}, "telemetry": telemetry or {}}
        table["engine"] = {"parallel": double.settings.parallel}
        if keys is not None:
            (tmp_path / "keys.toml").write_text(keys)
            table["auth"] = {"keys_file": tmp_path / "keys.toml"}
        app = create_app(Settings.model_validate(table), lambda _: double)
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(
            uvicorn.Config(app, http=Protocol, log_config=None, lifespan="on", timeout_graceful_shutdown=5)
        )
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


@pytest.fixture(scope="session")
def lets() -> Iterator[Callable[[str, str], bool]]:
    """lets(grammar, text): whether llama.cpp's own sampler lets a model write exactly `text`."""
    os.environ["LLAMA_CPP_LIB_PATH"] = os.environ["MTMD_CPP_LIB"] = required("LLAMAHERD_TEST_LIB_DIR")
    llama = load()
    quiet = llama.llama_log_callback(lambda _level, _text, _data: None)
    llama.llama_log_set(quiet, ctypes.c_void_p(0))
    parameters = llama.llama_model_default_params()
    parameters.vocab_only = True
    model = llama.llama_model_load_from_file(required("LLAMAHERD_TEST_MODEL").encode(), parameters)
    vocab = llama.llama_model_get_vocab(model)

    def allowed(sampler: Any, token: int) -> bool:
        one = llama.llama_token_data(token, 1.0, 0.0)
        array = llama.llama_token_data_array(ctypes.pointer(one), 1, -1, False)
        llama.llama_sampler_apply(sampler, ctypes.byref(array))
        return not math.isinf(array.data[0].logit)

    def lets(grammar: str, text: str) -> bool:
        sampler = llama.llama_sampler_init_grammar(vocab, grammar.encode(), b"root")
        assert sampler, "llama.cpp cannot read the grammar"
        encoded = text.encode()
        tokens = (llama.llama_token * (len(encoded) + 8))()
        count = llama.llama_tokenize(vocab, encoded, len(encoded), tokens, len(tokens), False, False)
        try:
            for token in tokens[:count]:
                if not allowed(sampler, token):
                    return False
                llama.llama_sampler_accept(sampler, token)
            return allowed(sampler, llama.llama_vocab_eos(vocab))
        finally:
            llama.llama_sampler_free(sampler)

    yield lets
    llama.llama_model_free(model)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds; the test's own timeout ends a wait in vain."""
    while not condition():
        await asyncio.sleep(0.005)
