"""Runs the streaming client of one product: `python stream_clients.py PRODUCT URL KEY STREAMS TOKENS`.

Runs under the product's own Python. Reads STREAMS concurrent requests of TOKENS events each and prints the CPU time of
this process in microseconds per event. That covers everything from the prompt to the record of the request, as in the
product's own load generator. A first round warms up connections and whatever else is created only once.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

PROMPT = "river stone market winter engine garden signal copper"


def main() -> None:
    product, url, key, streams, tokens = sys.argv[1:]
    print(CLIENTS[product](url, key, int(streams), int(tokens)))


def ours(url: str, key: str, streams: int, tokens: int) -> float:
    """Run a load session as Locust's users do, and write its samples as JSON."""
    import gevent

    from llamaherd_loadtest.client import ChatClient, Target
    from llamaherd_loadtest.samples import write_samples
    from llamaherd_loadtest.session import LoadSession
    from llamaherd_loadtest.workload import Calibration, Lengths, Prompts, Workload

    client = ChatClient(Target(url=url, key=key))
    workload = Workload(name="bench", description="", prompt=Lengths(8), output=Lengths(tokens))
    prompts = Prompts(workload, model="paced", seed=1, calibration=Calibration(1.0, 0.0))

    def all_at_once() -> list[int]:
        session = LoadSession(client, prompts, lambda **_: None)
        gevent.joinall([gevent.spawn(session.send) for _ in range(streams)])
        write_samples(Path(os.devnull), session.samples)
        return [sample.events for sample in session.samples]

    all_at_once()
    started = time.process_time()
    events = all_at_once()
    return _per_event(time.process_time() - started, events, tokens)


def guidellm(url: str, key: str, streams: int, tokens: int) -> float:
    """Run guidellm's OpenAI backend, from the request to the compiled response."""
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
    """Do what aiperf's worker does with a request, on the same loop and without garbage collection: the record becomes
    JSON for another process (but is not sent), and its responses are parsed."""
    import gc

    import uvloop
    from aiperf.common.enums import CreditPhase, ModelSelectionStrategy
    from aiperf.common.messages import InferenceResultsMessage
    from aiperf.common.models import ModelEndpointInfo, RequestInfo, Text, Turn
    from aiperf.common.models.model_endpoint_info import EndpointInfo, ModelInfo, ModelListInfo
    from aiperf.workers.inference_client import InferenceClient

    models = ModelListInfo(
        models=[ModelInfo(name="paced")], model_selection_strategy=ModelSelectionStrategy.ROUND_ROBIN
    )
    endpoint = EndpointInfo(type="chat", base_urls=[url], streaming=True, api_key=key, use_legacy_max_tokens=True)
    where = ModelEndpointInfo(models=models, endpoint=endpoint)

    async def run() -> float:
        client = InferenceClient(where, "worker")
        await client.initialize()

        async def one() -> int:
            request = RequestInfo(
                model_endpoint=where,
                credit_num=0,
                credit_phase=CreditPhase.PROFILING,
                x_request_id="request",
                x_correlation_id="session",
                conversation_id="conversation",
                turn_index=0,
                turns=[Turn(role="user", texts=[Text(contents=[PROMPT])], max_tokens=tokens)],
            )
            record = await client.send_request(request)
            InferenceResultsMessage(service_id="worker", record=record).to_json_bytes()
            responses, _ = client.endpoint.process_responses(record, capture_assistant_turn=False)
            return sum(bool(response.data and response.data.get_text()) for response in responses)

        return await _measure(one, streams, tokens)

    gc.collect()
    gc.freeze()
    gc.disable()
    return uvloop.run(run())


async def _measure(one: Callable[[], Awaitable[int]], streams: int, tokens: int) -> float:
    await asyncio.gather(*(one() for _ in range(streams)))
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
