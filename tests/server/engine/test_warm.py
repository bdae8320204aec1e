"""Chats stay warm when they are more than slots, and over a worker's death, a restart and a reconfigure."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from llamaherd_server.engine.embedded import EmbeddedEngine
from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.wire.protocol import Stats
from tests.random_models import Kind, RandomModel

from .asking import ENDLESS, ask
from .conftest import running

SETTINGS = EngineSettings(parallel=2, ctx_per_slot=512, batch=512, ubatch=128, threads=1)
CHATS = [[*range(1000 * number, 1000 * number + 250)] for number in range(1, 6)]
NEW = 16
KINDS: list[Kind] = ["dense", "hybrid", "sliding_window"]


async def turn(engine: EmbeddedEngine, chats: list[list[int]]) -> list[int]:
    """Ask for each chat's next answer, which becomes its history; how many tokens of each were cached."""
    cached = []
    for chat in chats:
        answer = await ask(engine, [*chat], NEW, ENDLESS, logprobs=0)
        cached.append(answer.finished.cached_tokens)
        chat.extend([*(one.token for one in answer.logprobs), 7, 8, 9])
    return cached


def stats(engine: EmbeddedEngine) -> Stats:
    found = engine.status().stats
    assert found
    return found


@pytest.mark.parametrize("kind", KINDS)
async def test_chats_are_warm_whatever_ends(kind: Kind, tmp_path: Path) -> None:
    more: dict[str, Any] = {"prompt_cache_mib": 256, "prompt_cache_dir": tmp_path / "prompts"}
    path, chats = RandomModel(kind, layers=6, width=128).path(), [[*chat] for chat in CHATS]

    def warm() -> list[int]:
        """All but what is new, and the last token of an answer, which nobody had to compute."""
        return [len(chat) - 4 for chat in chats]

    async with running(SETTINGS, path=path, **more) as engine:
        assert await turn(engine, chats) == [0] * 5
        expected = warm()
        assert await turn(engine, chats) == expected
        assert stats(engine).cached_memory_tokens == sum(expected)
        await engine.retune(EngineSettings(parallel=3, ctx_per_slot=512, batch=256, ubatch=64, threads=1))
        expected = warm()
        assert await turn(engine, chats) == expected
        os.kill(engine.status().pid or 0, signal.SIGKILL)
        while engine.status().state == "ready":
            await asyncio.sleep(0.01)
        expected = warm()
        assert await turn(engine, chats) == expected
    async with running(SETTINGS, path=path, **more) as engine:
        expected = warm()
        assert await turn(engine, chats) == expected
        assert stats(engine).cached_disk_tokens == sum(expected)
    async with running(SETTINGS, path=RandomModel(kind, layers=7, width=128).path(), **more) as engine:
        assert await turn(engine, chats) == [0] * 5


@pytest.mark.parametrize("why", ["folder", "memory"])
async def test_what_cannot_be_kept_is_one_line_and_the_server_serves(
    why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = RandomModel("dense", layers=6, width=128).path()
    (tmp_path / "file").touch()
    more: dict[str, dict[str, Any]] = {
        "folder": {"prompt_cache_mib": 64, "prompt_cache_dir": tmp_path / "file" / "prompts"},
        "memory": {"prompt_cache_mib": 2**30},
    }
    async with running(SETTINGS, path=path, **more[why]) as engine:
        assert (await ask(engine, CHATS[0], NEW)).finished.completion_tokens
    lines = [line for line in capsys.readouterr().out.splitlines() if "prompt_cache" in line]
    assert len(lines) == 1
    assert {"folder": "prompts are not kept over a restart", "memory": "lower it"}[why] in lines[0]
