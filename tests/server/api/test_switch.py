"""What a request sees when another engine takes over from the one that works on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from llamaherd_server.config.settings import Settings
from llamaherd_server.engine import switch
from llamaherd_server.engine.base import Event
from llamaherd_server.engine.switch import Switch
from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.wire.errors import EngineError
from llamaherd_server.wire.protocol import Finished, Generate, Started

from .double import Double


class Endless(Double):
    """Begins with the prompt "begun" alone, and never ends; `stop` ends what it works on."""

    async def generate(self, request: Generate) -> AsyncGenerator[Event, None]:
        if request.prompt == "begun":
            yield Started(1, 1, 0)
        self.running += 1
        while self.state == "ready":
            await asyncio.sleep(0.001)
        raise EngineError("engine_stopped", "the server is stopping")


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Switch:
    """Embedded it never ends; the other answers at once."""
    monkeypatch.setattr(switch, "RETUNE_DRAIN_S", 0.1)
    (tmp_path / "model.gguf").touch()
    settings = Settings.model_validate({"model": {"name": "double", "path": tmp_path / "model.gguf"}})
    return Switch(settings, lambda one: Endless() if one.engine.kind == "embedded" else Double(kind="llama-server"))


async def answer(engine: Switch, prompt: str) -> list[Event]:
    return [event async for event in engine.generate(Generate(id=0, prompt=prompt, max_tokens=1))]


async def both_run(engine: Switch) -> list[asyncio.Task[list[Event]]]:
    asked = [asyncio.create_task(answer(engine, prompt)) for prompt in ("begun", "queued")]
    while engine.current.running < 2:  # type: ignore[attr-defined]
        await asyncio.sleep(0.001)
    return asked


async def test_past_the_drain_what_began_fails_and_what_did_not_goes_to_the_other(engine: Switch) -> None:
    begun, queued = await both_run(engine)
    await engine.retune(EngineSettings(), "llama-server")
    with pytest.raises(EngineError) as lost:
        await begun
    assert lost.value.code == "engine_crashed"
    assert isinstance((await queued)[-1], Finished)
    assert engine.status().kind == "llama-server"


async def test_a_server_that_stops_starts_no_other_engine(engine: Switch) -> None:
    asked = await both_run(engine)
    switching = asyncio.create_task(engine.retune(EngineSettings(), "llama-server"))
    while engine.status().state != "restarting":
        await asyncio.sleep(0.001)
    await engine.stop()
    for task in (switching, *asked):
        with pytest.raises(EngineError) as told:
            await task
        assert told.value.code == "engine_stopped"
    assert (engine.status().kind, engine.status().state) == ("embedded", "stopped")
