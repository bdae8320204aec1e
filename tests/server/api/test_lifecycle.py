"""Loading, draining, failing, and clients that go away, over the double."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from llamaherd_server.engine.base import Event
from llamaherd_server.wire.errors import EngineError
from llamaherd_server.wire.protocol import Generate, Started
from tests.sse import events_of

from .conftest import Serve, until
from .double import Double


async def test_while_loading_probes_answer_and_requests_are_told_to_come_back(serve: Serve) -> None:
    double = Double(state="loading")
    async with serve(double) as served:
        assert (await served.http.get("/livez")).status_code == 200
        refused = [await served.http.get("/readyz"), await served.chat()]
        double.state = "ready"
        assert (await served.chat()).status_code == 200
    for reply in refused:
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "model_loading")
        assert int(reply.headers["Retry-After"]) > 0


async def test_while_restarting_requests_are_taken_but_readiness_is_gone(serve: Serve) -> None:
    async with serve(Double(state="restarting")) as served:
        assert (await served.http.get("/readyz")).status_code == 503
        assert (await served.chat()).status_code == 200


async def test_a_wedged_step_loop_is_not_alive(serve: Serve) -> None:
    double = Double(heartbeat_age_s=0.0)
    async with serve(double, heartbeat_timeout_s=5) as served:
        assert (await served.http.get("/livez")).status_code == 200
        double.heartbeat_age_s = 6.0
        assert (await served.http.get("/livez")).status_code == 503


async def test_an_engine_that_cannot_start_ends_the_process_with_an_error(serve: Serve) -> None:
    double = Double(state="loading", refuse_start=EngineError("internal", "no such model"))
    async with serve(double) as served:
        await until(lambda: served.server.should_exit)
        assert served.state.lifecycle.exit_code == 1


async def test_an_engine_that_failed_for_good_ends_the_process_with_an_error(serve: Serve) -> None:
    double = Double()
    async with serve(double) as served:
        double.state = "failed"
        await until(lambda: served.server.should_exit)
        assert served.state.lifecycle.exit_code == 1


async def test_draining_refuses_new_requests_and_finishes_the_running_ones(serve: Serve) -> None:
    double = Double(tokens=20, pace_s=0.02)
    async with serve(double) as served:
        running = asyncio.create_task(served.chat(stream=True))
        await until(lambda: double.running == 1)
        served.state.lifecycle.drain()
        refused = [await served.http.get("/readyz"), await served.chat()]
        finished = await running
        await until(lambda: served.server.should_exit)
    for reply in refused:
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "shutting_down")
        assert "Retry-After" in reply.headers
    assert finished.text.endswith("data: [DONE]\n\n")
    assert served.state.lifecycle.exit_code == 0


async def test_at_the_drain_deadline_streams_get_an_error_event(serve: Serve) -> None:
    double = Double(tokens=10_000, pace_s=0.01)
    async with serve(double, drain_timeout_s=0.1) as served:
        running = asyncio.create_task(served.chat(stream=True))
        await until(lambda: double.running == 1)
        served.state.lifecycle.drain()
        cut = await running
    assert events_of(cut.text, done=False)[-1]["error"]["code"] == "engine_stopped"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_cancels_its_request(serve: Serve, stream: bool) -> None:
    double = Double(tokens=10_000, pace_s=0.01)
    async with serve(double) as served:
        running = asyncio.create_task(served.chat(stream=stream, n=2))
        await until(lambda: double.running == 2)
        running.cancel()
        await until(lambda: double.running == 0)
        assert double.closed_early == 2
        assert served.state.serving.admission.running == 0


async def test_a_client_that_goes_away_while_queued_leaves_the_queue(serve: Serve) -> None:
    double = Double(tokens=10_000, pace_s=0.01)
    async with serve(double) as served:
        admission = served.state.serving.admission
        running = [asyncio.create_task(served.chat()) for _ in range(admission.limit)]
        await until(lambda: admission.running == admission.limit)
        queued = asyncio.create_task(served.chat(stream=True))
        await until(lambda: admission.queued == 1)
        queued.cancel()
        await until(lambda: admission.queued == 0)
        for task in running:
            task.cancel()
        await until(lambda: double.running == 0)
    assert len(double.seen) == len(running)


async def test_overload_is_a_429_or_a_503_at_once(serve: Serve) -> None:
    double = Double(tokens=10_000, pace_s=0.01)
    async with serve(double, max_queue=1, queue_timeout_s=0.2) as served:
        admission = served.state.serving.admission
        running = [asyncio.create_task(served.chat()) for _ in range(admission.limit)]
        await until(lambda: admission.running == admission.limit)
        late = asyncio.create_task(served.chat())
        await until(lambda: admission.queued == 1)
        full, late_reply = await served.chat(), await late
        for task in running:
            task.cancel()
    assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
    assert (late_reply.status_code, late_reply.json()["error"]["code"]) == (503, "queue_timeout")
    assert "Retry-After" in full.headers
    assert "Retry-After" in late_reply.headers


async def test_a_request_that_takes_too_long_is_a_504(serve: Serve) -> None:
    async def hang(request: Generate) -> AsyncGenerator[Event, None]:
        await asyncio.sleep(60)
        yield Started(request.id, 0, 0)

    async with serve(Double(script=hang), request_timeout_s=0.05) as served:
        reply = await served.chat()
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "request_timeout")
    assert reply.headers["X-Should-Retry"] == "false"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_without_a_first_token_in_time_is_a_504_and_one_with_it_may_go_on(
    serve: Serve, stream: bool
) -> None:
    async def hang(request: Generate) -> AsyncGenerator[Event, None]:
        yield Started(request.id, 0, 0)
        await asyncio.sleep(60)

    async with serve(Double(script=hang), first_token_timeout_s=0.05) as served:
        reply = await served.chat(stream=stream)
        assert served.state.serving.admission.running == 0
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "first_token_timeout")
    async with serve(Double(tokens=10, pace_s=0.02), first_token_timeout_s=0.15) as served:
        assert (await served.chat(stream=stream)).status_code == 200


async def test_systemd_is_told_of_readiness_the_watchdog_and_the_end(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    told.bind(str(tmp_path / "notify"))
    told.setblocking(False)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "60000")
    messages: list[str] = []

    def heard(message: str) -> bool:
        try:
            while True:
                messages.append(told.recv(4096).decode())
        except BlockingIOError:
            return any(message in one for one in messages)

    double = Double(tokens=1000, pace_s=0.005)
    async with serve(double, heartbeat_timeout_s=5) as served:
        await until(lambda: heard("READY=1"))
        await until(lambda: heard("WATCHDOG=1"))
        await until(lambda: heard("STATUS=ready: 0 of 4 slots busy, 0 requests queued, 0 tokens/s"))
        talking = asyncio.create_task(served.chat(max_tokens=1000))
        await until(lambda: heard("STATUS=") and bool(re.search(r"queued, [1-9]\d* tokens/s", messages[-1])))
        talking.cancel()
        served.state.lifecycle.reload()
        await until(lambda: heard("RELOADING=1"))
        reloading = next(one for one in messages if "RELOADING=1" in one)
        assert 0 < int(reloading.partition("MONOTONIC_USEC=")[2]) <= time.monotonic_ns() // 1000
        assert "READY=1" in messages[messages.index(reloading) :]
        double.heartbeat_age_s = 6.0
        for _ in range(2):  # the first may have been on its way
            heard("")
            messages.clear()
            await until(lambda: heard("STATUS="))
        assert not any("WATCHDOG" in one for one in messages)
        served.state.lifecycle.drain()
        await until(lambda: heard("STOPPING=1"))
    told.close()


async def test_admin_changes_the_engine_and_the_queue_follows(serve: Serve) -> None:
    double = Double()
    async with serve(double) as served:
        changed = await served.http.put("/admin/engine", json={"parallel": 8, "batch": 1024})
        assert changed.json()["settings"] == (await served.http.get("/admin/engine")).json()["settings"]
        assert (double.settings.parallel, double.settings.batch, double.settings.ubatch) == (8, 1024, 512)
        assert served.state.serving.admission.limit == 10
        for settings in ({"ubatch": 4096}, {"parallel": "many"}, {"speed": 1}, {"parallel": 100}):
            assert (await served.http.put("/admin/engine", json=settings)).status_code == 400
        assert (double.settings.parallel, double.settings.ubatch) == (8, 512)
