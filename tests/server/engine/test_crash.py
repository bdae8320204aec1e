"""Workers that die, hang or never start, and front ends that die."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from llamaherd_server.engine import process
from llamaherd_server.engine.embedded import EmbeddedEngine
from llamaherd_server.wire.errors import EngineError
from llamaherd_server.wire.protocol import Sampling

from ..conftest import required
from .asking import Answer, ask
from .conftest import SETTINGS, running

TIMEOUT_S = 30


def is_running(pid: int) -> bool:
    """A zombie does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def busy_with_16(engine: EmbeddedEngine) -> list[asyncio.Task[Answer]]:
    tasks = [asyncio.create_task(ask(engine, f"Story {number}:", 24)) for number in range(16)]
    while (stats := engine.status().stats) is None or stats.slots_busy < SETTINGS.parallel:
        await asyncio.sleep(0.02)
    return tasks


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
async def test_a_dead_worker_costs_the_running_requests_and_no_other(number: signal.Signals) -> None:
    async with running() as engine:
        tasks = await busy_with_16(engine)
        os.kill(engine.status().pid or 0, number)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        crashed = [answer for answer in answers if isinstance(answer, EngineError)]
        assert len(crashed) == SETTINGS.parallel
        assert all(error.code == "engine_crashed" for error in crashed)
        assert sum(isinstance(answer, Answer) for answer in answers) == 16 - SETTINGS.parallel
        status = engine.status()
        assert (status.state, status.restarts) == ("ready", 1)
        assert number.name in (status.last_error or "")


async def test_a_wedged_worker_is_killed_and_replaced() -> None:
    async with running(heartbeat_timeout_s=3) as engine:
        pid = engine.status().pid or 0
        os.kill(pid, signal.SIGSTOP)
        question = asyncio.create_task(ask(engine, "The capital of France is", 2))
        assert (await question).text == " Paris."
        assert engine.status().pid != pid
        assert "sent no heartbeat for 3 s" in (engine.status().last_error or "")


DYING_LANES = """
import sys
from llamaherd_server.worker import __main__, lanes

lanes.Lanes._next = lambda self: self._waiting["nobody"].popleft() if self._waiting else None
sys.exit(__main__.main())
"""


async def test_a_thread_that_dies_takes_the_worker_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "PROGRAM", ("-c", DYING_LANES))
    async with running() as engine:
        with pytest.raises(EngineError) as error:
            await ask(engine, "A story:", 4, sampling=Sampling(grammar='root ::= "a"'))
        assert error.value.code == "engine_crashed"
        assert "KeyError" in (engine.status().last_error or "")
        assert (await ask(engine, "The capital of France is", 2)).text == " Paris."


async def test_signals_to_the_group_do_not_end_the_worker_but_stopping_does() -> None:
    async with running() as engine:
        pid = engine.status().pid or 0
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
        assert (await ask(engine, "The capital of France is", 2)).text == " Paris."
        unanswered = asyncio.create_task(ask(engine, "A story:", 400))
        while (stats := engine.status().stats) is None or stats.slots_busy == 0:
            await asyncio.sleep(0.01)
        await engine.stop()
        with pytest.raises(EngineError) as error:
            await unanswered
        assert error.value.code == "engine_stopped"
        assert not is_running(pid)


ORPHAN = """
import asyncio, os, sys
from pathlib import Path
from llamaherd_server.engine.embedded import EmbeddedEngine
from llamaherd_server.wire.engine_settings import EngineSettings

async def main():
    engine = EmbeddedEngine(Path(sys.argv[1]), EngineSettings(parallel=1, ctx_per_slot=256))
    await engine.start()
    print(engine.status().pid, flush=True)
    os._exit(1)

asyncio.run(main())
"""


async def test_the_worker_dies_with_its_front_end() -> None:
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", ORPHAN, required("LLAMAHERD_TEST_MODEL")), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await parent.communicate()
    async with asyncio.timeout(TIMEOUT_S):
        while is_running(int(out)):
            await asyncio.sleep(0.05)


def damaged(path: Path, damage: str) -> Path:
    whole = Path(required("LLAMAHERD_TEST_MODEL")).read_bytes()
    content = {"no magic": b"plain text", "garbage": b"GGUF" + b"\xff" * 64, "truncated": whole[: len(whole) // 2]}
    if damage in content:
        path.write_bytes(content[damage])
    return path


@pytest.mark.parametrize("damage", ["no magic", "garbage", "truncated", "missing"])
async def test_a_file_that_is_no_model_is_one_clear_line(tmp_path: Path, damage: str) -> None:
    path = damaged(tmp_path / "model.gguf", damage)
    engine = EmbeddedEngine(path, SETTINGS)
    with pytest.raises(EngineError, match=str(path)) as error:
        await engine.start()
    assert "\n" not in error.value.message
    assert engine.status().state == "failed"
    await engine.stop()
