"""A worker that dies under 16 streams, seen by the clients: who loses what, and what the probes say meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from pathlib import Path

import httpx
import pytest

from tests.sse import events_of

from ..conftest import running

STREAMS, PARALLEL = 16, 4


async def stream(client: httpx.AsyncClient, number: int, begun: asyncio.Event) -> str:
    """`done`, or the code of the error that the client was told of: by the status, or by an event if there was one."""
    body = {"prompt": f"Story {number}:", "max_tokens": 24, "stream": True, "ignore_eos": True}
    async with client.stream("POST", "/v1/completions", json=body) as reply:
        if reply.status_code != 200:
            assert reply.status_code == 503
            return str(json.loads(await reply.aread())["error"]["code"])
        text = ""
        async for piece in reply.aiter_text():
            begun.set()
            text += piece
    if "[DONE]" in text:
        return "done" if events_of(text) else "empty"
    return str(events_of(text, done=False)[-1]["error"]["code"])


async def watch(client: httpx.AsyncClient, seen: dict[str, Counter[int]]) -> None:
    while True:
        for path, statuses in seen.items():
            statuses[(await client.get(path)).status_code] += 1
        await asyncio.sleep(0.02)


def worker_of(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return next(int(one) for one in children if "llamaherd_server.worker" in Path(f"/proc/{one}/cmdline").read_text())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
async def test_running_streams_end_with_an_error_queued_ones_are_served(tmp_path: Path, number: signal.Signals) -> None:
    seen: dict[str, Counter[int]] = {path: Counter() for path in ("/livez", "/metrics", "/readyz")}
    with running(tmp_path, engine={"parallel": PARALLEL}) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            begun = asyncio.Event()
            streams = [asyncio.create_task(stream(client, one, begun)) for one in range(STREAMS)]
            await begun.wait()
            watching = asyncio.create_task(watch(client, seen))
            os.kill(worker_of(server.process.pid), number)
            ends = Counter(await asyncio.gather(*streams))
            watching.cancel()
            assert (await client.get("/readyz")).status_code == 200
        assert f"the engine ended with signal {number.name}" in server.log.read_text()
    assert set(ends) == {"done", "engine_crashed"}
    assert 1 <= ends["engine_crashed"] <= PARALLEL
    assert set(seen["/livez"]) == set(seen["/metrics"]) == {200}
    assert set(seen["/readyz"]) == {200, 503}
