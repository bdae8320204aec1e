"""One product's streaming client at work: `python stream_clients.py PRODUCT URL KEY STREAMS TOKENS`.

Runs under the product's own Python. STREAMS requests of TOKENS events each are read at once; prints the CPU that this
process spent on them, microseconds an event, the requests included. A first request warms up what is made once.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

PROMPT = "river stone market winter engine garden signal copper"


def main() -> None:
    product, url, key, streams, tokens = sys.argv[1:]
    print(CLIENTS[product](url, key, int(streams), int(tokens)))


def ours(url: str, key: str, streams: int, tokens: int) -> float:
    import gevent

    from llamaherd_loadtest.client import ChatClient, Target, clock
    from llamaherd_loadtest.samples import Sample
    from llamaherd_loadtest.session import LoadSession
    from llamaherd_loadtest.workload import Calibration, Lengths, Prompts, Workload

    client = ChatClient(Target(url=url, key=key))
    workload = Workload(name="bench", description="", prompt=Lengths(8), output=Lengths(tokens))
    prompts = Prompts(workload, model="paced", seed=1, calibration=Calibration(1.0, 0.0))
    session = LoadSession(client, prompts, lambda **_: None)
    client.stream(prompts.request(0), Sample(index=0, scheduled=clock()))
    started = time.process_time()
    gevent.joinall([gevent.spawn(session.send) for _ in range(streams)])
    spent = time.process_time() - started
    return _per_event(spent, [sample.events for sample in session.samples], tokens)


def guidellm(url: str, key: str, streams: int, tokens: int) -> float:
    """Its OpenAI backend, from the request to the compiled response."""
    from guidellm.backends.openai.http import OpenAIHTTPBackend
    from guidellm.schemas import GenerationRequest, RequestInfo
    from guidellm.schemas.backends.openai_http import OpenAIHTTPBackendArgs

    arguments = OpenAIHTTPBackendArgs(
        target=url,
        model="paced",
        api_key=key,
        request_format="/v1/chat/completions",
        validate_backend=False,
        extras={"body": {"max_tokens": tokens}},
    )

    async def run() -> float:
        backend = OpenAIHTTPBackend(arguments)
        await backend.process_startup()

        async def one() -> int:
            response: Any = None
            async for response, _ in backend.resolve(  # noqa: B007 (the last one counts)
                GenerationRequest(columns={"text_column": [PROMPT]}), RequestInfo()
            ):
                pass
            return int(response.output_metrics.text_tokens)

        return await _measure(one, streams, tokens)

    return asyncio.run(run())


def aiperf(url: str, key: str, streams: int, tokens: int) -> float:
    """Its aiohttp client, and its decoding of the events, which in its own runs is another process's work."""
    from aiperf.transports.aiohttp_client import AioHttpClient

    body = {"model": "paced", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": tokens, "stream": True}
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream", "Authorization": f"Bearer {key}"}

    async def run() -> float:
        client = AioHttpClient()

        async def one() -> int:
            record = await client.post_request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
            decoded = [message.get_json() for message in record.responses]
            return sum(
                bool(event and event["choices"] and event["choices"][0]["delta"].get("content")) for event in decoded
            )

        return await _measure(one, streams, tokens)

    return asyncio.run(run())


async def _measure(one: Callable[[], Awaitable[int]], streams: int, tokens: int) -> float:
    await one()
    started = time.process_time()
    events = await asyncio.gather(*(one() for _ in range(streams)))
    return _per_event(time.process_time() - started, events, tokens)


def _per_event(spent_s: float, events: list[int], tokens: int) -> float:
    if set(events) != {tokens}:
        raise RuntimeError(f"{tokens} events were sent to each stream, and {sorted(set(events))} were read")
    return 1e6 * spent_s / sum(events)


CLIENTS = {"ours": ours, "guidellm": guidellm, "aiperf": aiperf}

if __name__ == "__main__":
    main()
