"""Streams that llama-server's events are passed on in, over a double of that engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from llamaherd_server.api import answer
from llamaherd_server.engine.base import OwnApi
from llamaherd_server.wire.errors import EngineError
from llamaherd_server.wire.sse import sent_events

from .conftest import Serve
from .double import Double

STREAM = {"prompt": "x", "stream": True}
TIMINGS = '{"prompt_n": 3, "cache_n": 2, "predicted_n": 1, "prompt_ms": 5, "predicted_ms": 5}'
EVENTS = ('data: {"content": "a"}\n\n', ":\n\n", f'data: {{"content": "", "timings": {TIMINGS}}}\n\n')


class Passing(Double):
    """Answers with `events`, the first of them after `wait_s`."""

    wait_s = 0.0
    events: tuple[str, ...] = EVENTS
    refusal: EngineError | None = None

    @property
    def own_api(self) -> OwnApi:
        return self

    async def get(self, path: str) -> Any:
        return {"/props": {"default_generation_settings": {"params": {"top_k": 7}}, "total_slots": 9}}[path]

    @asynccontextmanager
    async def asked(self, path: str, body: dict[str, Any]) -> AsyncIterator[httpx.Response]:
        assert (path, body) == ("/completion", STREAM)
        await asyncio.sleep(self.wait_s)
        if self.refusal:
            raise self.refusal
        yield httpx.Response(200, content=self._bytes())

    async def _bytes(self) -> AsyncIterator[bytes]:
        for event in self.events:
            yield event.encode()


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> Passing:
    monkeypatch.setattr(answer, "KEEP_ALIVE_S", 0.05)
    return Passing()


async def test_events_are_passed_on_and_counted(serve: Serve, passing: Passing) -> None:
    async with serve(passing) as served:
        reply = await served.http.post("/completion", json=STREAM)
        metrics = (await served.http.get("/metrics")).text
    assert reply.text == "".join(EVENTS)
    assert 'llamaherd_output_tokens_sum{key="anonymous",model="double"} 1.0' in metrics


async def test_a_long_prompt_and_a_place_in_the_queue_are_no_silence(serve: Serve, passing: Passing) -> None:
    passing.wait_s = 0.3
    passing.settings = passing.settings.__class__(parallel=1)
    async with serve(passing) as served:
        replies = await asyncio.gather(*(served.http.post("/completion", json=STREAM) for _ in range(4)))
    for reply in replies:
        assert reply.text.startswith(": keep-alive\n\n")
        assert reply.text.replace(": keep-alive\n\n", "") == "".join(EVENTS)


async def test_props_are_the_engines_own_with_this_model(serve: Serve, passing: Passing) -> None:
    async with serve(passing) as served:
        props = (await served.http.get("/props")).json()
    assert (props["total_slots"], props["model_alias"]) == (9, "double")
    assert props["default_generation_settings"]["params"]["top_k"] == 7


@pytest.mark.parametrize(("wait_s", "status"), [(0.0, 400), (0.3, 200)])
async def test_a_refusal_is_the_status_or_an_event(serve: Serve, passing: Passing, wait_s: float, status: int) -> None:
    passing.wait_s = wait_s
    passing.refusal = EngineError("invalid_value", "the prompt is empty")
    async with serve(passing) as served:
        reply = await served.http.post("/completion", json=STREAM)
    assert reply.status_code == status
    assert '"message":"the prompt is empty"' in reply.text


async def test_an_answer_that_never_begins_has_a_deadline(serve: Serve, passing: Passing) -> None:
    passing.wait_s = 30
    async with serve(passing, first_token_timeout_s=0.2) as served:
        reply = await served.http.post("/completion", json=STREAM)
    assert reply.status_code == 200
    assert "first_token_timeout" in reply.text


async def test_an_engine_that_ends_before_an_event_is_an_error(serve: Serve, passing: Passing) -> None:
    passing.events = (":\n\n",)
    async with serve(passing) as served:
        reply = await served.http.post("/completion", json=STREAM)
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "engine_crashed")


async def test_events_are_the_same_wherever_the_network_cuts_them() -> None:
    sent = ': a\n\nevent: b\ndata: {"c": "é\u2028\x85\r"}\n\ndata:1\ndata: 2\n\ndata: cut'.encode()
    data = ["", '{"c": "é\u2028\x85\r"}', "1\n2", "cut"]

    async def pieces(size: int) -> AsyncIterator[bytes]:
        for start in range(0, len(sent), size):
            yield sent[start : start + size]

    for size in range(1, len(sent) + 1):
        events = [event async for event in sent_events(pieces(size))]
        assert [event.data for event in events] == data
        assert b"".join(event.raw for event in events) == sent
