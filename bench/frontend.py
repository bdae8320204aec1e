"""CPU cost and added latency of the front end, on a worker that paces its tokens (tests/server/paced_worker.py).

Process, socket and supervisor are the real ones. The text of each token is the time at which the engine sent it, on
the client's clock. `bound` is the maximum of a figure.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import ssl
import threading
import time
from bisect import bisect_left
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import cast

import uvloop
from prometheus_client import CollectorRegistry

from bench import servers
from bench.servers import WORK, Flags, Running, cpu_s
from bench.serving import ROUNDS, p95
from bench.table import Metric, Result, metric
from llamaherd_server.config.settings import Settings
from llamaherd_server.http.middleware import RequestLog
from llamaherd_server.http.traces import Traces
from llamaherd_server.serving.meter import Usage
from tests.server.collector import collecting

WORKER = Path(__file__).resolve().parent.parent / "tests/server/paced_worker.py"
STREAMS = 64
TOKENS_PER_S = 5000
TOKENS = 400
_STAMP = re.compile(rb'"text":" (\d+)"')
_TIMINGS = re.compile(rb'"prompt_ms":([\d.]+)')


@dataclass
class Stream(asyncio.Protocol):
    """One streamed completion: data and arrival times. It is parsed only at the end, which keeps the client cheap."""

    request: bytes
    sent: float = 0.0
    data: bytearray = field(default_factory=bytearray)
    ends: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.sent = time.monotonic()
        cast(asyncio.WriteTransport, transport).write(self.request)

    def data_received(self, data: bytes) -> None:
        self.times.append(time.monotonic())
        self.data += data
        self.ends.append(len(self.data))

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        if not self.done.cancelled():
            self.done.set_result(None)

    def tokens(self) -> list[tuple[float, float]]:
        """Return when the engine sent each token and when it arrived. Raises RuntimeError for an incomplete stream."""
        if b"data: [DONE]" not in self.data:
            raise RuntimeError(f"no full stream: {bytes(self.data[-500:])!r}")
        stamps = _STAMP.finditer(self.data)
        return [(int(stamp[1]) / 1e9, self.times[bisect_left(self.ends, stamp.end())]) for stamp in stamps]

    def ttft(self) -> float:
        return self.tokens()[0][1] - self.sent

    def ttft_added(self) -> float:
        """Return the client's TTFT without the engine's time for the prompt, in seconds."""
        timings = _TIMINGS.search(self.data)
        assert timings  # noqa: S101 (llama-server always sends them)
        return self.ttft() - float(timings[1]) / 1000


async def stream(
    port: int, max_tokens: int, *, words: int = 8, key: str = "", tls: ssl.SSLContext | None = None
) -> Stream:
    body = {"prompt": "herd " * words, "max_tokens": max_tokens, "timings_per_token": True}
    return await complete(port, body, key=key, tls=tls)


async def complete(port: int, body: dict[str, object], *, key: str = "", tls: ssl.SSLContext | None = None) -> Stream:
    """Stream one /v1/completions."""
    content = json.dumps({**body, "stream": True}).encode()
    request = (
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
        b"Authorization: Bearer %b\r\nContent-Length: %d\r\n\r\n%b" % (key.encode(), len(content), content)
    )
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_connection(lambda: Stream(request), "127.0.0.1", port, ssl=tls)
    try:
        await protocol.done
    finally:
        transport.close()
    return protocol


def run() -> Result:
    wanted = os.environ.get("BENCH_SCENARIOS", "loaded,unloaded,fairness,traces").split(",")
    scenarios = {"loaded": loaded, "unloaded": unloaded, "fairness": fairness, "traces": traces}
    return {name: scenarios[name]() for name in wanted}


def loaded() -> dict[str, Metric]:
    """Measure 64 concurrent streams with 5,000 tokens/s in total."""
    figures: dict[str, list[float]] = {"frontend_cores": [], "itl_added_p95_ms": [], "output_tokens_per_s": []}

    async def load(server: Running) -> None:
        await asyncio.gather(*(stream(server.port, 20) for _ in range(STREAMS)))
        for _ in range(ROUNDS):
            cpu, began = cpu_s(server.pid), time.monotonic()
            streams = await asyncio.gather(*(stream(server.port, TOKENS) for _ in range(STREAMS)))
            took = time.monotonic() - began
            added = [
                (after[1] - before[1]) - (after[0] - before[0])
                for one in streams
                for before, after in pairwise(one.tokens())
            ]
            figures["frontend_cores"].append((cpu_s(server.pid) - cpu) / took)
            figures["itl_added_p95_ms"].append(1000 * p95(added))
            figures["output_tokens_per_s"].append(STREAMS * TOKENS / took)

    with paced(parallel=STREAMS, step_ms=1000 * STREAMS / TOKENS_PER_S) as server:
        uvloop.run(load(server))
    bounds = {"frontend_cores": 1.0, "itl_added_p95_ms": 5.0}
    return {name: bounded(values, bounds.get(name)) for name, values in figures.items()}


def unloaded() -> dict[str, Metric]:
    """Measure requests one after the other: TTFT less the engine's own timings, median and 95th percentile."""

    async def load(server: Running) -> list[list[float]]:
        await stream(server.port, 2)
        return [[1000 * (await stream(server.port, 2)).ttft_added() for _ in range(50)] for _ in range(ROUNDS)]

    with paced(parallel=4, step_ms=5) as server:
        rounds = uvloop.run(load(server))
    return {
        "ttft_added_p50_ms": bounded([median(added) for added in rounds], 3.0),
        "ttft_added_p95_ms": bounded([p95(added) for added in rounds], None),
    }


def fairness() -> dict[str, Metric]:
    """Measure a key that sends one request after the other: first alone, then with 200 requests of another key."""

    async def load(server: Running) -> tuple[float, float]:
        async def light(count: int) -> float:
            return p95([(await stream(server.port, 16, words=400, key="light")).ttft() for _ in range(count)])

        alone = await light(30)
        flood = [asyncio.create_task(stream(server.port, 64, words=400, key="flood")) for _ in range(200)]
        await asyncio.sleep(0.5)
        beside = await light(30)
        if all(one.done() for one in flood):
            raise RuntimeError("the flood was over before the other key had been measured")
        for one in flood:
            one.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
        return alone, beside

    keys = WORK / "fairness-keys.toml"
    WORK.mkdir(parents=True, exist_ok=True)
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("light", "flood")}
    keys.write_text("\n".join(f'[[keys]]\nname = "{name}"\nsha256 = "{digest}"' for name, digest in digests.items()))
    rounds = []
    for _ in range(ROUNDS):
        with paced(parallel=8, step_ms=20, tables=f"[auth]\nkeys_file = {json.dumps(str(keys))}\n") as server:
            rounds.append(uvloop.run(load(server)))
    return {
        "ttft_p95_alone_ms": bounded([1000 * alone for alone, _ in rounds], None),
        "ttft_p95_beside_ms": bounded([1000 * beside for _, beside in rounds], None),
        "ttft_p95_raised": bounded([beside / alone for alone, beside in rounds], 2.0),
    }


def traces() -> dict[str, Metric]:
    """Measure the CPU time that a trace adds to a request in the front end, also as a share of the cost in `loaded`.

    The two are measured separately, because under load the difference would be less than the noise.
    """
    added = [trace_ms() for _ in range(ROUNDS)]
    costs: dict[int, list[float]] = {TOKENS: [], TOKENS // 8: []}

    async def load(server: Running) -> None:
        await asyncio.gather(*(stream(server.port, 20) for _ in range(STREAMS)))
        for _ in range(ROUNDS):
            for length, cost in costs.items():
                cpu = cpu_s(server.pid)
                await asyncio.gather(*(stream(server.port, length) for _ in range(STREAMS)))
                cost.append(1000 * (cpu_s(server.pid) - cpu) / STREAMS)

    step_ms = 1000 * STREAMS / TOKENS_PER_S
    with paced(parallel=STREAMS, step_ms=step_ms) as server:
        uvloop.run(load(server))
    shares = {
        f"share_of_{length}_tokens_percent": bounded([100 * median(added) / one for one in cost], 2.0)
        for length, cost in costs.items()
    }
    return {"trace_ms": bounded(added, None), **shares}


def trace_ms(requests: int = 15 * 512) -> float:
    """Return the CPU time of a streamed chat's trace in ms: creating its span, and sending spans, 512 at a time."""
    scope = {"type": "http", "method": "POST", "headers": []}
    usage = Usage(200, 100, 64, entered_s=0.001, queued_s=0.01, ttft_s=0.1, ended_s=0.9, outcomes=["stop"])
    with collecting() as collector:
        table = {"model": {"name": "bench", "path": __file__}, "telemetry": {"otlp_endpoint": collector.url}}
        to = Traces(Settings.model_validate(table), CollectorRegistry())
        [sender] = [one for one in threading.enumerate() if one.name == "OtelBatchSpanRecordProcessor"]
        assert sender.ident  # noqa: S101 (it has started)
        clock = time.pthread_getcpuclockid(sender.ident)
        spent = -time.thread_time()
        for number in range(requests):
            record = RequestLog(f"{number:032x}")
            record.key, record.models, record.usage, record.streamed = "bench", ("bench", "bench"), usage, True
            to.record(scope, record, "/v1/chat/completions", 200)
            while to._created - to._exporter.taken >= 1024:
                time.sleep(0.01)  # the sender's turn
        spent += time.thread_time()
        while to._created > to._exporter.taken:
            time.sleep(0.1)
        time.sleep(0.5)  # the last batch is on its way
        spent += time.clock_gettime(clock)
        asyncio.run(to.close())
        if len(collector.spans) != requests:
            raise RuntimeError(f"{len(collector.spans)} of {requests} spans came")
    return 1000 * spent / requests


def paced(*, parallel: int, step_ms: float, tables: str = "") -> AbstractContextManager[Running]:
    flags = Flags(parallel=parallel, ctx_per_slot=2048, unified=True)
    doubled = {"PYTHONPATH": str(WORKER.parent / "doubled"), "WORKER_DOUBLE": str(WORKER)}
    environment = doubled | {"PACED_STEP_MS": str(step_ms)}
    return servers.ours(flags, tables, environment)


def bounded(figures: list[float], bound: float | None) -> Metric:
    return metric({"ours": figures} if bound is None else {"ours": figures, "bound": [bound] * len(figures)})
