"""What the front end and the worker cost beside the native server, with the same flags."""

from __future__ import annotations

import asyncio

from bench import servers
from bench.client import complete


async def load(port: int) -> None:
    await asyncio.gather(*(complete(port, "herd " * 100, 32) for _ in range(4)))


def test_resident_memory_is_at_most_llama_servers_and_150_mib() -> None:
    flags = servers.Flags(parallel=4, ctx_per_slot=2048, unified=True)
    rss = {}
    for start in (servers.ours, servers.llama_server):
        with start(flags) as server:
            asyncio.run(load(server.port))
            rss[start.__name__] = server.rss_mib
    assert rss["ours"] <= rss["llama_server"] + 150, rss
