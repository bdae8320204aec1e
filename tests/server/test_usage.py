"""What the real server's ledger holds after it was killed, its worker was, or its disk was full: what clients got."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from .conftest import Server, paced, required, running
from .native.conftest import native

ENGINE = {"parallel": 8, "ctx_per_slot": 4096}
SECRETS = ("one", "other", "root")


def keys(folder: Path, **limits: int) -> dict[str, Any]:
    """The [auth] table; `limits`: the first key's."""
    lines: list[str] = []
    for name in SECRETS:
        lines += ["[[keys]]", f'name = "{name}"', f'sha256 = "{hashlib.sha256(name.encode()).hexdigest()}"']
        lines += [f"{limit} = {value}" for limit, value in limits.items()] if name == "one" else []
    (folder / "keys.toml").write_text("\n".join([*lines, "admin = true", ""]))
    return {"keys_file": str(folder / "keys.toml")}


def sections(folder: Path, **limits: int) -> dict[str, Any]:
    """Of a server of two models over a paced worker."""
    models = [{"name": name, "path": required("LLAMAHERD_TEST_MODEL")} for name in ("small", "large")]
    limits_table = {"usage_dir": str(folder / "usage"), "prompt_cache_mib": 0}
    return {"auth": keys(folder, **limits), "models": models, "engine": ENGINE, "limits": limits_table}


def told(server: Server, key: str = "root") -> dict[tuple[str, str], dict[str, int]]:
    """What GET /v1/usage tells, by key and model."""
    page = httpx.get(f"{server.url}/v1/usage", headers={"Authorization": f"Bearer {key}"}, timeout=20).json()
    rows = [one for bucket in page["data"] for one in bucket["results"]]
    return {(one["api_key_id"], one["model"]): one for one in rows}


class Clients:
    """Streams of two keys to two models, and the tokens that each has got, with the time of each one."""

    def __init__(self, server: Server) -> None:
        self._http = httpx.AsyncClient(base_url=server.url, timeout=60)
        self.got: dict[tuple[str, str], list[float]] = {}
        self.asked: Counter[tuple[str, str]] = Counter()

    async def stream(self, key: str, model: str, tokens: int) -> None:
        body = {"model": model, "prompt": "x", "max_tokens": tokens, "stream": True}
        self.asked[key, model] += 1
        headers = {"Authorization": f"Bearer {key}"}
        with suppress(httpx.TransportError):
            async with self._http.stream("POST", "/v1/completions", json=body, headers=headers) as reply:
                async for line in reply.aiter_lines():
                    if line.startswith("data: {") and json.loads(line[6:]).get("choices", [{}])[0].get("text"):
                        self.got.setdefault((key, model), []).append(time.monotonic())

    async def all(self, tokens: int, rounds: int = 1) -> None:
        pairs = [(key, model) for key in SECRETS[:2] for model in ("small", "large")]
        await asyncio.gather(*(self.stream(*pair, tokens) for pair in pairs for _ in range(rounds)))


async def test_what_a_killed_server_was_asked_is_in_the_ledger(tmp_path: Path) -> None:
    with running(tmp_path, paced(step_ms=10), **sections(tmp_path)) as server:
        clients = Clients(server)
        await clients.all(20, rounds=3)
        whole = told(server)
        assert {pair: one["output_tokens"] for pair, one in whole.items()} == {
            pair: len(times) for pair, times in clients.got.items()
        }
        assert {one["num_model_requests"] for one in whole.values()} == {3}
        assert told(server, "one") == {pair: one for pair, one in whole.items() if pair[0] == "one"}
        streams = asyncio.create_task(clients.all(3000))
        await asyncio.sleep(4)
        server.process.kill()
        killed = time.monotonic()
        await streams
    with running(tmp_path, paced(step_ms=10), **sections(tmp_path)) as server:
        after = told(server)
    assert set(after) == set(clients.got)
    for pair, times in clients.got.items():
        until_flush = sum(at < killed - 1.5 for at in times)
        assert until_flush <= after[pair]["output_tokens"] <= len(times) + 10, pair
        assert until_flush > 100
        assert after[pair]["num_model_requests"] == 4


def first_worker(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return next(int(one) for one in children if "paced_worker" in Path(f"/proc/{one}/cmdline").read_text())


async def test_what_a_crashed_workers_clients_got_is_counted(tmp_path: Path) -> None:
    with running(tmp_path, paced(step_ms=10), **sections(tmp_path)) as server:
        clients = Clients(server)
        streams = asyncio.create_task(clients.all(400))
        await asyncio.sleep(1.5)
        os.kill(first_worker(server.process.pid), signal.SIGKILL)
        await streams
        counted = {pair: one["output_tokens"] for pair, one in told(server).items()}
    assert counted == {pair: len(times) for pair, times in clients.got.items()}
    assert set(counted.values()) - {400}  # some were cut off


def test_a_budget_is_held_over_restarts(tmp_path: Path) -> None:
    def asked(server: Server) -> httpx.Response:
        body = {"model": "small", "prompt": "x", "max_tokens": 50}
        return httpx.post(f"{server.url}/v1/completions", json=body, headers={"Authorization": "Bearer one"})

    for turn in range(2):
        with running(tmp_path, paced(step_ms=2), **sections(tmp_path, tokens_per_day=60)) as server:
            reply = asked(server)
            server.process.kill() if turn else server.terminate()
        assert reply.status_code == (429 if turn else 200), reply.text
    assert reply.json()["error"]["code"] == "insufficient_quota"


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert condition()


@pytest.mark.parametrize("what", ["full", "unusable"])
async def test_a_disk_that_takes_nothing_stops_no_stream_and_is_written_later(tmp_path: Path, what: str) -> None:
    usage = tmp_path / "usage"
    if what == "unusable":
        usage.touch()  # it should be a directory
    with running(tmp_path, paced(step_ms=5), **sections(tmp_path)) as server:
        clients = Clients(server)
        if what == "full":
            await clients.all(5)
            most = (usage / "usage.db-wal").stat().st_size
            resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        await clients.all(200)
        await asyncio.sleep(1.2)
        await clients.all(200)
        got = {pair: len(times) for pair, times in clients.got.items()}
        assert set(got.values()) == {405 if what == "full" else 400}
        assert server.log.read_text().count("usage is counted in memory") == 1
        if what == "full":
            assert {pair: one["output_tokens"] for pair, one in told(server).items()} == got
            resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        else:
            usage.unlink()
        until(lambda: "usage is written again" in server.log.read_text())
        server.process.kill()
    with running(tmp_path, paced(), **sections(tmp_path)) as server:
        assert {pair: one["output_tokens"] for pair, one in told(server).items()} == got


def streamed(reply: httpx.Response) -> list[dict[str, Any]]:
    lines = [line[6:] for line in reply.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


CHAT = {"messages": [{"role": "user", "content": "Tell me of the sea."}]}
USAGE = {"stream_options": {"include_usage": True}}
CONTENT_ALONE = {"response_fields": ["content"], "cache_prompt": False}
# What each answer says it used: prompt, cached and completion tokens.
ASKED: list[tuple[str, dict[str, Any], Callable[[httpx.Response], tuple[int, ...]]]] = [
    ("/v1/chat/completions", {**CHAT, "max_tokens": 7}, lambda reply: openai(reply.json()["usage"])),
    (
        "/v1/chat/completions",
        {**CHAT, "max_tokens": 7, "n": 2, "stream": True, **USAGE},
        lambda reply: openai(streamed(reply)[-1]["usage"]),
    ),
    ("/v1/completions", {"prompt": ["One", "Two"], "max_tokens": 5}, lambda reply: openai(reply.json()["usage"])),
    ("/v1/embeddings", {"input": ["a cat", "a dog"]}, lambda reply: (reply.json()["usage"]["prompt_tokens"], 0, 0)),
    (
        "/v1/messages",
        {**CHAT, "model": "smollm2", "max_tokens": 6},
        lambda reply: anthropic(reply.json()["usage"]),
    ),
    ("/completion", {"prompt": "Hello", "n_predict": 5}, lambda reply: llama(reply.json()["timings"])),
    (
        "/completion",
        {"prompt": "Hello there", "n_predict": 6, "stream": True, "timings_per_token": True, "return_progress": True},
        lambda reply: llama(streamed(reply)[-1]["timings"]),
    ),
    (
        "/completion",
        {"prompt": "Hello once more", "n_predict": 4, "ignore_eos": True, **CONTENT_ALONE},
        lambda reply: (3, 0, 4) if reply.json()["content"] else (),
    ),
]


def openai(usage: dict[str, Any]) -> tuple[int, ...]:
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return usage["prompt_tokens"], cached, usage["completion_tokens"]


def anthropic(usage: dict[str, Any]) -> tuple[int, ...]:
    cached = usage["cache_read_input_tokens"]
    return usage["input_tokens"] + cached, cached, usage["output_tokens"]


def llama(timings: dict[str, Any]) -> tuple[int, ...]:
    return timings["prompt_n"] + timings["cache_n"], timings["cache_n"], timings["predicted_n"]


@pytest.mark.parametrize("engine", ["embedded", "llama-server"])
def test_every_apis_usage_is_what_its_answers_say(tmp_path: Path, engine: str) -> None:
    table = {} if engine == "embedded" else native(extra_args=["--embeddings", "--pooling", "mean"])
    found, expected = {}, {}
    names = ("input_tokens", "input_cached_tokens", "output_tokens")
    with running(tmp_path, engine=table) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        before: tuple[int, ...] = (0, 0, 0)
        for number, (path, body, used) in enumerate(ASKED):
            reply = http.post(path, json=body)
            assert reply.status_code == 200, reply.text
            (row,) = told(server).values()
            now = tuple(row[name] for name in names)
            found[number, path] = tuple(new - old for new, old in zip(now, before, strict=True))
            expected[number, path] = used(reply)
            before = now
            assert row["num_model_requests"] == number + 1
    assert found == expected
