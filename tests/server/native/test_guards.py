"""What keeps a llama-server that does not come up, or does not answer, from taking the server with it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from llamaherd_server.__main__ import _engine
from llamaherd_server.config.settings import load
from llamaherd_server.engine import switch
from llamaherd_server.wire.errors import EngineError

from ..conftest import Server, running, spawn, write_config
from .conftest import native

ASK = {"messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 4, "temperature": 0}
# llama-server, but with some settings something else: one that never becomes ready, and one that refuses a flag.
PROGRAM = """#!/bin/sh
case "$*" in
    *"--parallel 3 "*) exec sleep 600 ;;
    *"--parallel 4 "*) exec {binary} "$@" --no-such-flag ;;
    *) exec {binary} "$@" ;;
esac
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The [engine] table."""
    engine = native()
    path = tmp_path_factory.mktemp("program") / "llama-server"
    path.write_text(PROGRAM.format(binary=engine["binary"]))
    path.chmod(0o755)
    return {**engine, "binary": str(path)}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, program: dict[str, Any]) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("guards"), engine=program, limits={"load_timeout_s": 20}) as started:
        yield started


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        pytest.param({"parallel": 3}, "not ready after 20 s", id="never ready"),
        pytest.param({"parallel": 4}, "no-such-flag", id="refused"),
        pytest.param({"parallel": 2, "ctx_per_slot": 100_000_000}, "MiB are available", id="no memory"),
    ],
)
def test_settings_that_do_not_come_up_leave_the_old_ones(
    http: httpx.Client, settings: dict[str, int], reason: str
) -> None:
    refused = http.put("/admin/engine", json=settings)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "does_not_fit")
    assert reason in refused.json()["error"]["message"]
    assert http.get("/admin/engine").json()["settings"]["parallel"] == 2
    assert http.post("/v1/chat/completions", json=ASK).status_code == 200


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        pytest.param({"parallel": 3}, "not ready after 1 s", id="never ready"),
        pytest.param({"ctx_per_slot": 100_000_000}, "MiB are available", id="no memory"),
    ],
)
def test_a_first_start_that_cannot_be_ends_with_the_reason(
    tmp_path: Path, program: dict[str, Any], settings: dict[str, int], reason: str
) -> None:
    config = write_config(tmp_path, engine={**program, **settings}, limits={"load_timeout_s": 1})
    process = spawn(config)
    assert process.wait(60) == 1
    assert reason in config.with_name("server.log").read_text()


@pytest.mark.parametrize(
    ("limits", "stream", "code"),
    [
        pytest.param({"first_token_timeout_s": 0.05}, True, "first_token_timeout", id="first token"),
        pytest.param({"request_timeout_s": 0.05}, False, "request_timeout", id="whole request"),
    ],
)
def test_what_is_passed_on_has_its_deadlines(tmp_path: Path, limits: dict[str, float], stream: bool, code: str) -> None:
    engine = native(ctx_per_slot=2048)
    with running(tmp_path, engine=engine, limits=limits) as server:
        body = {"prompt": [1 + n % 40_000 for n in range(1900)], "n_predict": 100, "ignore_eos": True, "stream": stream}
        late = httpx.post(f"{server.url}/completion", json=body, timeout=60)
        assert (late.status_code, late.json()["error"]["code"]) == (504, code)


async def test_a_request_that_a_change_of_settings_cuts_off_is_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its key would be refused after a few: see Quotas.crashed."""
    monkeypatch.setattr(switch, "RETUNE_DRAIN_S", 0.0)
    settings = load(write_config(tmp_path, engine=native(parallel=1, ctx_per_slot=1024)))
    engine = switch.Switch(settings, partial(_engine, 1))
    await engine.start()
    try:
        body = {"prompt": "Once upon a time", "n_predict": 900, "ignore_eos": True, "stream": True}
        async with asyncio.TaskGroup() as group:
            with pytest.raises(EngineError, match="the engine ended while") as ended:
                async with engine.using() as current:
                    assert current.own_api
                    async with current.own_api.asked("/completion", body) as answer:
                        other = msgspec.structs.replace(engine.status().settings, ubatch=64)
                        group.create_task(engine.retune(other))
                        async for _ in answer.aiter_raw():
                            pass
        assert (type(ended.value) is EngineError, ended.value.code) == (False, "engine_crashed")
        assert (engine.status().state, engine.status().settings.ubatch) == ("ready", 64)
    finally:
        await engine.stop()
