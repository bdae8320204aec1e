"""The processes that work on untrusted input: what a call does to its process costs only that call."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llamaherd_server.app import SANDBOXED
from llamaherd_server.chat.adapt import prompt_of, traits_of
from llamaherd_server.chat.jinja import Rendering, render
from llamaherd_server.errors import ApiError
from llamaherd_server.http.json_body import decode
from llamaherd_server.process.priority import START_NICE, Patience, lower
from llamaherd_server.process.turns import caller
from llamaherd_server.sandbox import pool
from llamaherd_server.sandbox.pool import Sandbox, SandboxError, Slow
from llamaherd_server.toolcalls.tools import grammar_of_reply

BURNS = Rendering("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", {})
FINE = Rendering("{{ x }}", {"x": "é"})


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    sandbox = Sandbox()
    await sandbox.start()
    yield sandbox
    await sandbox.stop()


def children() -> list[int]:
    """Those of this process that render and convert; other tests have left others."""
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in pids if b"sandbox.child" in Path(f"/proc/{pid}/cmdline").read_bytes()]


async def test_an_api_error_of_the_function_arrives_as_it_is(sandbox: Sandbox) -> None:
    with pytest.raises(ApiError) as refused:
        await sandbox.in_child(decode, b"{", 20)
    assert (refused.value.status_code, refused.value.code) == (400, "invalid_json")
    assert refused.value.detail.startswith("the body is not valid JSON: EOF")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
async def test_a_signal_from_outside_costs_nobody_a_request(sandbox: Sandbox, number: signal.Signals) -> None:
    for pid in children():
        os.kill(pid, number)
    assert await sandbox.in_child(render, FINE, 0.5) == "é"


async def test_calls_that_come_together_take_turns_rather_than_start_processes(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_WAIT_FOR_IDLE_S", 600)
    before = children()
    assert await asyncio.gather(*(sandbox.in_child(render, FINE) for _ in range(5))) == ["é"] * 5
    assert children() == before


async def test_the_process_of_a_slow_call_is_not_used_again(sandbox: Sandbox) -> None:
    [slow] = children()
    many = "{% for a in range(150) %}{% for b in range(99999) %}{% endfor %}{% endfor %}é"
    assert await sandbox.in_child(render, Rendering(many, {}), 30) == "é"
    assert slow not in children()


def test_a_slow_process_gets_less_of_the_cpu() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        patience = Patience(process.pid)
        assert not patience.lowered
        while not patience.lowered:
            patience.look()
        assert os.getpriority(os.PRIO_PROCESS, process.pid) >= min(19, os.getpriority(os.PRIO_PROCESS, 0) + 1)
        process.kill()
        process.wait()
        patience.again()
        assert not Patience(process.pid).lowered  # of one that has ended


async def test_a_call_that_burns_its_budget_delays_no_other(sandbox: Sandbox) -> None:
    burning = [asyncio.create_task(sandbox.in_child(render, BURNS, 30)) for _ in range(3)]
    try:
        assert await sandbox.in_child(render, FINE) == "é"
        assert not any(one.done() for one in burning)
    finally:
        for one in burning:
            one.cancel()
        await asyncio.gather(*burning, return_exceptions=True)


async def test_one_caller_leaves_processes_to_the_others() -> None:
    sandbox = Sandbox(most=3)

    async def burn() -> str:
        caller.set("flood")
        return await sandbox.in_child(render, BURNS, 30)

    burning = [asyncio.create_task(burn()) for _ in range(9)]
    try:
        assert await sandbox.in_child(render, FINE) == "é"
        assert not any(one.done() for one in burning)
    finally:
        for one in burning:
            one.cancel()
        await asyncio.gather(*burning, return_exceptions=True)
        await sandbox.stop()


async def test_a_call_is_slow_by_itself_or_for_the_host(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamaherd_server.sandbox.pool._OVERLOADED_S", 1.0)
    with pytest.raises(ApiError, match="the host is overloaded"):
        await sandbox.in_child(render, BURNS, 1000, 1e-3)
    monkeypatch.undo()
    monkeypatch.setattr("llamaherd_server.sandbox.pool._SLOW_SHARE", 1e-5)
    with pytest.raises(Slow, match="of CPU time, on a busy host"):
        await sandbox.in_child(render, BURNS, 1000, 1e-3)


async def test_what_a_call_would_import_is_there_before_it() -> None:
    assert {function.__module__ for function in (prompt_of, traits_of, grammar_of_reply)} == set(SANDBOXED)
    with pytest.raises(ApiError, match="no process for this request could be started"):
        await Sandbox(modules=["llamaherd_server.absent"]).start()


def test_what_is_made_ahead_of_children_has_a_lower_priority_and_they_do_not() -> None:
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    with ThreadPoolExecutor(1, initializer=lower) as beside:
        if sys.platform == "linux":
            assert beside.submit(os.getpriority, os.PRIO_PROCESS, 0).result() == min(19, usual + START_NICE)
    assert os.getpriority(os.PRIO_PROCESS, 0) == usual


async def test_cpu_time_is_bounded(sandbox: Sandbox) -> None:
    with pytest.raises(SandboxError, match=r"time: 0\.2 s"):
        await sandbox.in_child(render, BURNS, 0.2)
    assert await sandbox.in_child(render, FINE) == "é"


async def test_stopping_ends_what_runs() -> None:
    before = set(children())
    sandbox = Sandbox()
    burning = asyncio.create_task(sandbox.in_child(render, BURNS, 30))
    while not set(children()) - before:
        await asyncio.sleep(0.01)
    await sandbox.stop()
    with pytest.raises(ApiError, match="shutting down"):
        await burning
    assert set(children()) <= before
