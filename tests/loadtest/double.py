"""A paced stand-in for a server, with known times: run as a process, `python double.py`; prints its port.

The model's name picks how a stream is paced (see SCENARIOS); usage.prompt_tokens is the request's number, under which
GET /log gives when the request arrived and when each event was sent, on the machine's monotonic clock. Model "engine"
is as fast as its settings under /admin/engine make it; it and "paced" count prompt tokens as words plus ten, and
"paced" sends max_tokens events and says how long its prefill took. POST /tokenize counts words.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import ssl
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

KEY = "sesame"
DEFAULT = {"parallel": 4, "batch": 2048, "ubatch": 512, "ctx_per_slot": 2048, "kv_unified": True, "threads": 2}
TOKENS = 20
CONTEXT = 2048
PREFILL_S = 0.03
HIDDEN = 100  # tokens
WEDGED_AFTER = 20  # requests
# What llama-server repeats in each event.
ANSWER = {
    "created": 1764000000,
    "id": "chatcmpl-1Zk8bUBYp6cTnQ2sWf5oDvR3xGhJmLaE",
    "model": "double",
    "system_fingerprint": "b7000-0123abcd",
    "object": "chat.completion.chunk",
}


class Engine:
    """Speed by settings: steps of a batch get slower with its size, ubatch 128 is the best, 16 slots kill it."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = dict(DEFAULT)
        self.applied: list[dict[str, Any]] = []
        self.slots = asyncio.Semaphore(self.settings["parallel"])
        self.active = 0
        self.dead_until = 0.0

    def apply(self, change: dict[str, Any]) -> str:
        settings = {**self.settings, **change}
        if settings["parallel"] * settings["ctx_per_slot"] > 32 * 2048:
            return "parallel 64 does not fit: it needs 512 MiB, 256 MiB are free"
        self.settings = settings
        self.applied.append(change)
        self.slots = asyncio.Semaphore(settings["parallel"])
        return ""

    def step_s(self) -> float:
        ubatch = 1.0 if self.settings["ubatch"] == 128 else 1.6
        return 0.002 * ubatch * (3 + self.active)


class Double:
    def __init__(self, state: str) -> None:
        self.engine, self.state = Engine(), state
        self.log: dict[int, dict[str, Any]] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                method, path, _ = line.decode().split()
                prefix, path = ("/tenant", path.removeprefix("/tenant")) if path.startswith("/tenant/") else ("", path)
                headers = {}
                while (header := await reader.readline()).strip():
                    name, _, value = header.decode().partition(":")
                    headers[name.lower()] = value.strip()
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if headers.get("authorization") != f"Bearer {KEY}":
                    self.answer(writer, 401, {"error": {"message": "no such key", "type": "authentication_error"}})
                elif time.perf_counter() < self.engine.dead_until:
                    break
                elif path == "/v1/chat/completions":
                    request = json.loads(body)
                    if request["model"] == "dropped" and len(self.log) % 2:
                        self.log[len(self.log) + 1] = {"received": time.perf_counter(), "request": request}
                        break
                    await self.chat(request, writer, prefix)
                else:
                    self.answer(writer, *self.admin(method, path, body))
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, EOFError):
            pass
        finally:
            writer.close()

    def answer(self, writer: asyncio.StreamWriter, status: int, body: object) -> None:
        payload = json.dumps(body).encode()
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(payload)) + payload)

    def admin(self, method: str, path: str, body: bytes) -> tuple[int, object]:
        if path == "/log":
            return 200, self.log
        if path == "/v1/models":
            return 200, {"data": [{"id": name, "meta": {"n_ctx": CONTEXT}} for name in ("paced", "engine")]}
        if path == "/tokenize":
            return 200, {"tokens": list(range(len(json.loads(body)["content"].split())))}
        if path == "/applied":
            return 200, self.engine.applied
        refusal = self.engine.apply(json.loads(body)) if method == "PUT" else ""
        if refusal:
            return 400, {"error": {"message": refusal, "type": "invalid_request_error", "code": "does_not_fit"}}
        ready = self.state == "ready"
        model = {"name": "engine", "path": "engine.gguf", "size_bytes": 1 if ready else None}
        state = {
            "engine": "double",
            "state": self.state,
            "settings": self.engine.settings,
            "model": model,
            "build": "b1" if ready else None,
        }
        return 200, state

    async def chat(self, request: dict[str, Any], writer: asyncio.StreamWriter, prefix: str) -> None:
        number = len(self.log) + 1
        entry: dict[str, Any] = {"received": time.perf_counter(), "sent": [], "request": request, "prefix": prefix}
        self.log[number] = entry
        scenario = request["model"]
        if scenario == "busy" or (scenario == "flaky" and number % 60 == 30):
            self.answer(writer, 429, {"error": {"message": "slow down", "type": "rate_limit_error"}})
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        send(writer, event({"role": "assistant"}))
        count = 0
        if scenario == "engine":
            events = self.engine_events(request)
        else:
            wedged = scenario == "wedged" and number > WEDGED_AFTER
            events = paced(request["max_tokens"]) if scenario in ("paced", "flaky") else SCENARIOS[scenario]()
            events = silent() if wedged else events
        async with aclosing(events):
            async for pieces, tokens in events:
                if writer.is_closing():
                    return
                for piece in pieces:
                    send(writer, piece)
                    entry["sent"].append(time.perf_counter())
                    if len(pieces) > 1:
                        await asyncio.sleep(0.005)
                count += tokens
        if scenario == "gone":
            writer.transport.abort()
            return
        if scenario not in ("error", "truncated"):
            words = sum(len(str(message["content"]).split()) for message in request["messages"])
            known = scenario in ("engine", "paced", "flaky", "wedged")
            hidden = {"completion_tokens_details": {"reasoning_tokens": HIDDEN}} if scenario == "hidden" else {}
            last = {
                "choices": [],
                "usage": {"prompt_tokens": words + 10 if known else number, "completion_tokens": count, **hidden},
                **({"timings": {"prompt_ms": 1000 * PREFILL_S}} if scenario == "paced" else {}),
            }
            send(writer, event({}, FINISH.get(scenario, "length")) + b"data: " + json.dumps(last).encode() + b"\n\n")
            send(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")

    async def engine_events(self, request: dict[str, Any]) -> AsyncGenerator[tuple[list[bytes], int], None]:
        engine = self.engine
        async with engine.slots:
            engine.active += 1
            try:
                if engine.settings["parallel"] == 16:
                    engine.dead_until = time.perf_counter() + 1.0
                    raise ConnectionError
                for _ in range(request["max_tokens"]):
                    await asyncio.sleep(engine.step_s())
                    yield [event({"content": "x"})], 1
            finally:
                engine.active -= 1


def event(delta: dict[str, str], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice], **ANSWER}, ensure_ascii=False).encode() + b"\n\n"


def send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))


Events = AsyncGenerator[tuple[list[bytes], int], None]


async def constant(gap: float = 0.03, first: float = 0.05) -> Events:
    for i in range(TOKENS):
        await asyncio.sleep(gap if i else first)
        yield [event({"content": f"t{i}"})], 1


async def paced(tokens: int) -> Events:
    for i in range(tokens):
        await asyncio.sleep(0.02 if i else 0.04)
        yield [event({"content": f"t{i} "})], 1


async def jittered() -> Events:
    for i in range(TOKENS):
        await asyncio.sleep(random.uniform(0.01, 0.06))
        yield [event({"content": f"t{i}"})], 1


async def stalling() -> Events:
    for i in range(TOKENS):
        await asyncio.sleep(0.4 if i == 10 else 0.01)
        yield [event({"content": f"t{i}"})], 1


async def error() -> Events:
    async for item in constant(0.01):
        yield item
    yield [b'data: {"error":{"message":"engine crashed","type":"server_error"}}\n\n'], 0


async def split() -> Events:
    """Each event in two pieces, cut within a character of two bytes."""
    for _ in range(TOKENS):
        await asyncio.sleep(0.03)
        whole = event({"content": "é"})
        cut = whole.index("é".encode()) + 1
        yield [whole[:cut], whole[cut:]], 1


async def grouped() -> Events:
    for _ in range(TOKENS // 4):
        await asyncio.sleep(0.04)
        yield [event({"content": "four tokens at once"})], 4


async def silent() -> Events:
    await asyncio.sleep(30)
    yield [event({"content": "late"})], 1


async def hidden() -> Events:
    """Reasoning that no event shows, though usage counts it."""
    await asyncio.sleep(0.1)
    async for pieces, tokens in constant():
        yield pieces, tokens
    yield [], HIDDEN


async def bundled() -> Events:
    """The first event brings half of the tokens."""
    await asyncio.sleep(0.1)
    yield [event({"content": "word" * TOKENS})], TOKENS
    for _ in range(TOKENS):
        await asyncio.sleep(0.03)
        yield [event({"content": "word"})], 1


async def error_object() -> Events:
    """As vLLM reported errors before it had an `error` field."""
    async for item in constant(0.01):
        yield item
    yield [b'data: {"object":"error","message":"engine crashed","type":"server_error","code":500}\n\n'], 0


async def nulls() -> Events:
    """Fields that are null, and contents that are lists."""
    for null in ({"choices": None}, {"choices": [{"index": 0, "delta": None, "finish_reason": None}]}):
        yield [b"data: " + json.dumps({**null, "usage": None, "error": None}).encode() + b"\n\n"], 0
    for _ in range(TOKENS):
        await asyncio.sleep(0.03)
        parts = [{"type": "text", "text": "x"}, {"type": "image", "text": None}]
        yield [b"data: " + json.dumps({"choices": [{"delta": {"content": parts}}]}).encode() + b"\n\n"], 1


FINISH = {"abort": "abort"}
SCENARIOS = {
    "hidden": hidden,
    "bundled": bundled,
    "error_object": error_object,
    "nulls": nulls,
    "abort": constant,
    "dropped": constant,
    "wedged": lambda: constant(0.01, 0.02),
    "constant": constant,
    "jittered": jittered,
    "stalling": stalling,
    "slow_first": lambda: constant(0.01, 0.8),
    "error": error,
    "truncated": constant,
    "gone": constant,
    "split": split,
    "grouped": grouped,
    "silent": silent,
}


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cert")
    parser.add_argument("--state", default="ready")
    args = parser.parse_args()
    context = None
    if args.cert:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(args.cert)
    server = await asyncio.start_server(Double(args.state).serve, "127.0.0.1", 0, ssl=context)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
