"""What a hostile request costs others: eight streams of another key run while the corpus is sent, one at a time.

`bound` is the maximum of a figure. BENCH_ENGINES and BENCH_KINDS restrict a run; build/bench/hostile-*.jsonl has a line
for each request.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import uvloop

from bench import servers
from bench.frontend import bounded
from bench.hostile_corpus import Attack, corpus
from bench.servers import WORK, Flags, Running
from bench.table import BUILD, Metric, Result

STREAMS = 8
TOKENS = 100  # of one stream, which is restarted until the end
ANSWER_S = 5.0
GIVEN_UP_S = 20.0
QUIET_S = 20.0  # how long streams are measured without an attack
AFTER_S = 0.5  # by then, effects that outlast a response are visible
MALFORMED = 10_000
_RESTARTS = re.compile(r"^llamaherd_engine_restarts_total(?:\{[^}]*\})? (\S+)", re.MULTILINE)


def run() -> Result:
    kinds = os.environ.get("BENCH_KINDS", "").split(",")
    attacks = [attack for attack in corpus() if attack.kind in kinds or kinds == [""]]
    result: Result = {}
    for engine in os.environ.get("BENCH_ENGINES", "embedded,llama-server").split(","):
        flags = Flags(parallel=STREAMS + 2, ctx_per_slot=1024, unified=True, ubatch=128)
        with servers.ours(flags, f'kind = "{engine}"\n[auth]\nkeys_file = {json.dumps(_keys())}\n') as server:
            result[engine] = uvloop.run(_attacked(server, attacks, BUILD / f"hostile-{engine}.jsonl"))
            result[f"{engine}, malformed"] = uvloop.run(_malformed(server))
    return result


def _keys() -> str:
    WORK.mkdir(parents=True, exist_ok=True)
    path = WORK / "hostile-keys.toml"
    tables = []
    for name in ("stream", "attack", "probe"):
        admin = "\nadmin = true" if name == "probe" else ""
        tables.append(f'[[keys]]\nname = "{name}"\nsha256 = "{hashlib.sha256(name.encode()).hexdigest()}"{admin}')
    path.write_text("\n".join(tables))
    return str(path)


def _request(method: str, path: str, key: str, body: bytes = b"") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@dataclass
class Exchange(asyncio.Protocol):
    """One request on its own connection. It is parsed only at the end, so that the client never blocks."""

    request: bytes
    data: bytearray = field(default_factory=bytearray)
    times: list[float] = field(default_factory=list)
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.WriteTransport, transport).write(self.request)

    def data_received(self, data: bytes) -> None:
        self.times.append(time.monotonic())
        self.data += data

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        if not self.done.done():
            self.done.set_result(None)

    @property
    def status(self) -> int:
        """Return the HTTP status, or 0 without a response."""
        return int(self.data[9:12] or b"0")


async def _exchange(port: int, request: bytes, limit_s: float) -> Exchange:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_connection(lambda: Exchange(request), "127.0.0.1", port)
    with suppress(TimeoutError):
        await asyncio.wait_for(protocol.done, limit_s)
    transport.abort()
    return protocol


class Watch:
    """Keeps streams running and measures probes and the front end's memory, until `stop`."""

    def __init__(self, server: Running) -> None:
        self.server = server
        self.lost = 0
        self.rss_mib = self.probe_s = 0.0
        self._gaps: list[tuple[float, float]] = []  # when each gap ended, and its length in seconds
        self._open: dict[int, Exchange] = {}
        self._tasks = [asyncio.create_task(self._stream(number)) for number in range(STREAMS)]
        self._tasks += [asyncio.create_task(self._probe()), asyncio.create_task(self._memory())]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def largest_gap_s(self, since: float) -> float:
        """Return the largest gap of any stream in seconds, including gaps that have not ended yet."""
        now = time.monotonic()
        running = [now - max(one.times[-1], since) for one in self._open.values() if one.times]
        return max([*running, *(gap for ended, gap in self._gaps if ended >= since)], default=0.0)

    async def _stream(self, number: int) -> None:
        loop = asyncio.get_running_loop()
        fields = {"prompt": f"Story {number}:", "max_tokens": TOKENS, "stream": True, "ignore_eos": True}
        request = _request("POST", "/v1/completions", "stream", json.dumps(fields).encode())
        while True:
            transport, stream = await loop.create_connection(lambda: Exchange(request), "127.0.0.1", self.server.port)
            self._open[number] = stream
            seen = 1
            try:
                while not stream.done.done():
                    await asyncio.wait((stream.done,), timeout=0.1)
                    self._gaps += [(after, after - before) for before, after in pairwise(stream.times[seen - 1 :])]
                    seen = max(seen, len(stream.times))
            finally:
                transport.abort()
            self.lost += b"data: [DONE]" not in stream.data

    async def _probe(self) -> None:
        while True:
            for path in ("/livez", "/readyz"):
                asked = time.monotonic()
                answer = await _exchange(self.server.port, _request("GET", path, "probe"), GIVEN_UP_S)
                self.probe_s = max(self.probe_s, time.monotonic() - asked)
                self.lost += answer.status != 200
            await asyncio.sleep(0.2)

    async def _memory(self) -> None:
        while True:
            self.rss_mib = max(self.rss_mib, rss_mib(self.server.pid))
            await asyncio.sleep(0.05)


def rss_mib(pid: int) -> float:
    """Return the resident memory of one process, without its children."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


async def _restarts(server: Running) -> float:
    page = bytes((await _exchange(server.port, _request("GET", "/metrics", "probe"), GIVEN_UP_S)).data).decode()
    found = _RESTARTS.findall(page)
    if not found:
        raise RuntimeError("no restarts on the metrics page")
    return sum(map(float, found))


async def _attacked(server: Running, attacks: list[Attack], log: Path) -> dict[str, Metric]:
    for path in ("/v1/completions", "/v1/chat/completions"):  # warms up what is created only once
        fields = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
        body = json.dumps({**fields, "max_tokens": 2}).encode()
        await _exchange(server.port, _request("POST", path, "attack", body), GIVEN_UP_S)
    restarts, memory = await _restarts(server), rss_mib(server.pid)
    watch = Watch(server)
    await asyncio.sleep(3)
    quiet_from = time.monotonic()
    await asyncio.sleep(QUIET_S)
    quiet_s = watch.largest_gap_s(quiet_from)
    watch.rss_mib = 0.0
    rows = [await _one(watch, attack) for attack in attacks]
    await watch.stop()
    _report(log, rows, quiet_s)
    largest_s = max(row["gap_ms"] for row in rows) / 1000
    return {
        "requests": bounded([len(rows)], None),
        "gap_without_ms": bounded([1000 * quiet_s], None),
        "largest_gap_ms": bounded([1000 * largest_s], 1000.0),
        "gap_raised": bounded([largest_s / quiet_s], 3.0),
        "streams_lost": bounded([watch.lost], 0.0),
        "restarts": bounded([await _restarts(server) - restarts], 0.0),
        "memory_added_mib": bounded([max(0.0, watch.rss_mib - memory)], 64.0),
        "probe_ms": bounded([1000 * watch.probe_s], 1000.0),
        "answer_s": bounded([max(row["answer_s"] for row in rows)], ANSWER_S),
        "not_refused": bounded([sum(row["wrong"] for row in rows)], 0.0),
    }


async def _one(watch: Watch, attack: Attack) -> dict[str, Any]:
    sent = time.monotonic()
    answer = await _exchange(watch.server.port, _request("POST", attack.path, "attack", attack.body), GIVEN_UP_S)
    took = time.monotonic() - sent
    await asyncio.sleep(AFTER_S)
    fine = 400 <= answer.status < 500 or (answer.status == 200 and not attack.refused)
    return {
        "kind": attack.kind,
        "name": attack.name,
        "status": answer.status,
        "wrong": not fine,
        "answer_s": round(took, 2),
        "gap_ms": round(1000 * watch.largest_gap_s(sent)),
        "rss_mib": round(rss_mib(watch.server.pid)),
        "lost": watch.lost,
        "answer": bytes(answer.data).partition(b"\r\n\r\n")[2][:200].decode(errors="replace"),
    }


def _report(log: Path, rows: list[dict[str, Any]], quiet_s: float) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in sorted(rows, key=lambda row: -row["gap_ms"]):
        if row["wrong"] or row["answer_s"] > ANSWER_S or row["gap_ms"] > min(1000.0, 3000 * quiet_s):
            print(f"  {row['gap_ms']:>6} ms  {row['answer_s']:>5} s  {row['status']}  {row['kind']}: {row['name']}")


async def _malformed(server: Running) -> dict[str, Metric]:
    """Measure the growth of the front end's memory between the first tenth of the requests and the last."""
    bodies = [
        b"{",
        b"[]",
        b'"',
        b"null",
        b'{"prompt": 5}',
        b'{"messages": {}}',
        b'{"prompt": "a", "temperature": "hot"}',
    ]
    bodies += [b'{"prompt": "a", "no_such_field": %d}' % number for number in range(5)]
    paths = ["/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/embeddings", "/tokenize", "/nowhere"]
    requests = [_request("POST", path, "attack", body) for path in paths for body in bodies]
    wrong = 0
    memory = 0.0
    for number in range(0, MALFORMED, 10):
        batch = [requests[(number + i) % len(requests)] for i in range(10)]
        answers = await asyncio.gather(*(_exchange(server.port, request, GIVEN_UP_S) for request in batch))
        wrong += sum(not 400 <= answer.status < 500 for answer in answers)
        if number == MALFORMED // 10:
            memory = rss_mib(server.pid)
    return {
        "requests": bounded([MALFORMED], None),
        "not_4xx": bounded([wrong], 0.0),
        "memory_added_mib": bounded([max(0.0, rss_mib(server.pid) - memory)], 8.0),
    }
