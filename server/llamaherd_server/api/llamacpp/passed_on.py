"""llama-server's own routes: /props, /slots, /completion and /infill, on either engine.

Source of their fields: tools/server/README.md of the pinned llama.cpp.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple, Self

import httpx
import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import TypeAdapter

from llamaherd_server.api.answer import EventStream, answer, error_of, first_event, json_response, run_of, unless_gone
from llamaherd_server.api.llama_answer import generation_settings
from llamaherd_server.api.llamacpp.completion import (
    InfillRequest,
    LlamaCompletionRequest,
    LlamaFields,
    LlamaShape,
)
from llamaherd_server.api.openai.completions import grammar_of, resolve_prompts, texts_of
from llamaherd_server.api.routing import ModelRoute
from llamaherd_server.api.sampling import most_tokens, resolve_sampling
from llamaherd_server.api.state import AppState, state_of
from llamaherd_server.engine.base import Engine, EngineStatus, OwnApi
from llamaherd_server.errors import ApiError
from llamaherd_server.http.json_body import json_of, validated
from llamaherd_server.serving.generation import CHARS_PER_TOKEN, EXPECTED_OUTPUT, Serving, late_error
from llamaherd_server.serving.meter import Meter, Usage
from llamaherd_server.wire.errors import EngineError
from llamaherd_server.wire.protocol import Delta, Finished, Generate, Sampling, Started
from llamaherd_server.wire.sse import sent_events

router = APIRouter(route_class=ModelRoute)

# What a slot tells; its sampling parameters and texts are a request's own.
_SLOT_FIELDS = (
    *("id", "id_task", "n_ctx", "speculative", "is_processing", "next_token"),
    *("n_prompt_tokens", "n_prompt_tokens_processed", "n_prompt_tokens_cache"),
)
_TOKEN, _WORD = 0, 1  # of what triggers a grammar
_COMPLETION, _INFILL = TypeAdapter(LlamaCompletionRequest), TypeAdapter(InfillRequest)


@router.get("/props")
async def props(request: Request) -> Response:
    """The model's template and tokens, the slots and the sampling defaults."""
    state = state_of(request)
    status, info = state.engine.status(), state.model_info()
    known: dict[str, Any] = {
        "default_generation_settings": {"params": {}, "n_ctx": status.settings.ctx_per_slot},
        "total_slots": status.settings.parallel,
        "model_path": str(state.settings.model.path),
        "modalities": {"vision": False, "video": False, "audio": False},
        "endpoint_slots": True,
        "endpoint_props": False,
        "endpoint_metrics": True,
        "chat_template": info.chat_template or "",
        "bos_token": info.bos_token,
        "eos_token": info.eos_token,
        "build_info": info.build,
        "is_sleeping": False,
    }
    async with state.engine.peeked() as engine:
        if engine and engine.own_api:
            known = await engine.own_api.get("/props")
    defaults = state.sampling_defaults()
    limit = defaults.pop("max_tokens", -1)
    usual = generation_settings(Generate(id=0, prompt="", sampling=Sampling(**defaults), max_tokens=limit))
    known["default_generation_settings"]["params"] = {
        **usual,
        **known["default_generation_settings"]["params"],
        **defaults,
        **{"max_tokens": limit, "n_predict": limit},
    }
    return json_response({**known, "model_alias": state.model_name})


@router.get("/slots")
async def slots_of(request: Request) -> Response:
    """Which slots are busy. Never a prompt or an output. `?fail_on_no_slot=1`: a 503 when none is free."""
    state = state_of(request)
    async with state.engine.peeked() as engine:
        slots = await engine.own_api.get("/slots") if engine and engine.own_api else _slots(state.engine.status())
    shown = [{name: slot[name] for name in _SLOT_FIELDS if name in slot} for slot in slots]
    if request.query_params.get("fail_on_no_slot") and all(slot["is_processing"] for slot in shown):
        raise ApiError(503, "no slot is free", code="no_slot", retry_after=1)
    return json_response(shown)


def _slots(status: EngineStatus) -> list[dict[str, Any]]:
    busy = status.stats.slots_busy if status.stats else 0
    known = {"n_ctx": status.settings.ctx_per_slot, "speculative": status.settings.speculative != "off"}
    return [{"id": slot, **known, "is_processing": slot < busy} for slot in range(status.settings.parallel)]


@router.post("/completion", response_class=Response)
@router.post("/completions", response_class=Response)
async def completion(request: Request) -> Response:
    """llama-server's own completion; on the engine llama-server as that answers it."""
    if (native := await _passed_on(request, "/completion")) is not None:
        return native
    state = state_of(request)
    body = await validated(request, _COMPLETION)
    prompts = await resolve_prompts(state, body.prompt)
    return await _answered(request, body, prompts, several=len(prompts) > 1)


@router.post("/infill", response_class=Response)
async def infill(request: Request) -> Response:
    """llama-server's fill in the middle; on the engine llama-server as that answers it."""
    if (native := await _passed_on(request, "/infill")) is not None:
        return native
    body = await validated(request, _INFILL)
    return await _answered(request, body, [body.text(state_of(request).model_info())], several=False)


async def _answered(request: Request, body: LlamaFields, prompts: list[str | list[int]], *, several: bool) -> Response:
    """The embedded engine's answer."""
    state = state_of(request)
    await resolve_sampling(state, body)
    body.grammar = await grammar_of(state, body.grammar, body.json_schema)
    requests = [
        Generate(
            id=0,
            prompt=prompt,
            max_tokens=most_tokens(state, body.most),
            stop=body.stop or [],
            sampling=body.sampling(index),
            logprobs=body.logprobs,
            cache_prompt=body.cache_prompt,
        )
        for prompt in prompts
        for index in range(body.n)
    ]
    shape = LlamaShape(
        body, state.model_name, requests, await texts_of(state, prompts, body.n), several=several or body.n > 1
    )
    return await answer(request, run_of(request, requests, body.n), shape, stream=body.stream)


async def _passed_on(request: Request, path: str) -> Response | None:
    """Queue the request as any other and give it to llama-server; None: that does not compute here. Raises ApiError."""
    state = state_of(request)
    body = await json_of(request)
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_value")
    state.check_model(None, request.state.key)
    if state.engine.own_api is None:
        return None
    work = _Work(request, path, await _with_grammar(state, _with_defaults(state, body)))
    if not body.get("stream"):
        return await unless_gone(request.receive, work.whole())
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(work)
        await first_event(request.receive, work.first())
        return EventStream(work.chunks(), stack.pop_all())


def _with_defaults(state: AppState, body: dict[str, Any]) -> dict[str, Any]:
    """The body for llama-server, with what the model's settings say of sampling; the GGUF's part it knows itself."""
    defaults = dict(state.settings.model.sampling)
    limits = {"n_predict", "max_tokens", "max_completion_tokens"}
    given = {name: value for name, value in body.items() if value is not None and name != "model"}
    if most := defaults.pop("max_tokens", None):
        given = {name: value for name, value in given.items() if name not in limits or value != -1}
        if not limits & given.keys():
            defaults["n_predict"] = most
    if isinstance(fields := given.get("response_fields"), list) and fields:
        given["response_fields"] = [*fields, "index", "timings"]  # by which it is counted
    return defaults | given


async def _with_grammar(state: AppState, body: dict[str, Any]) -> dict[str, Any]:
    """The body with its schema as a grammar, which is tried before llama-server gets it; raises ApiError.

    llama-server's own conversion knows no bounds, and what it makes would be computed untried beside all streams. So
    would regular expressions that trigger a grammar.
    """
    triggers = body.get("grammar_triggers")
    for trigger in triggers if isinstance(triggers, list) else ():
        kind = trigger.get("type") if isinstance(trigger, dict) else None
        if type(kind) is not int or kind not in (_TOKEN, _WORD):
            message = f"grammar_triggers: only tokens (type {_TOKEN}) and words (type {_WORD}) are supported"
            raise ApiError(400, message, param="grammar_triggers", code="unsupported")
    if (schema := body.get("json_schema")) is None:
        return body
    if body.get("grammar"):
        raise ApiError(400, "grammar: not together with json_schema", param="grammar", code="unsupported")
    rest = {name: value for name, value in body.items() if name != "json_schema"}
    return {**rest, "grammar": await grammar_of(state, None, schema)}


def _own_api(engine: Engine, path: str) -> OwnApi:
    if engine.own_api:
        return engine.own_api
    raise ApiError(503, f"the engine changed before {path} could begin", code="engine_stopped", retry_after=1)


@asynccontextmanager
async def _admitted(request: Request, state: AppState, body: dict[str, Any]) -> AsyncIterator[Meter]:
    """A place among the running requests, within the key's limits; counted at the end."""
    serving, key = state.serving, request.state.key
    usage = Usage()
    request.state.log.follow(usage)
    by, arrived = (key.name, serving.model), request.state.log.arrived
    meter = Meter(serving.metrics, usage, by=by, arrived=arrived, counts_prompt=True)
    outcome = "cancelled"
    generations = _generations(body)
    cost = generations * len(await request.body()) / CHARS_PER_TOKEN
    tokens = cost + generations * _most_output(body, serving)
    with serving.reserve(key, usage, tokens=tokens, costs=[cost], slots=generations) as [ticket]:
        try:
            async with serving.place(ticket, lambda: meter.computed):
                meter.admitted()
                yield meter
            outcome = "stop"
        except (ApiError, EngineError) as error:
            outcome = error.code or "internal"
            raise
        finally:
            meter.ended(outcome)


def _generations(body: dict[str, Any]) -> int:
    """How many slots the request asks for; raises ApiError."""
    prompts = body.get("prompt")
    several = isinstance(prompts, list) and any(isinstance(one, str | list | dict) for one in prompts)
    count = max((body.get(name, 1) for name in ("n", "n_cmpl") if isinstance(body.get(name, 1), int)), default=1)
    if count < 1:
        raise ApiError(400, f"n: {count} must be at least 1", param="n", code="invalid_value")
    return count * (len(prompts) if several and isinstance(prompts, list) else 1)


def _most_output(body: dict[str, Any], serving: Serving) -> int:
    """The tokens that one generation is expected to have."""
    longest = serving.engine.status().settings.ctx_per_slot
    given = [value for name in ("n_predict", "max_tokens") if type(value := body.get(name)) is int and value > 0]
    return min(*given, longest) if given else min(EXPECTED_OUTPUT, longest)


def _count(meter: Meter, timings: dict[str, Any] | None, counted: int = 0) -> None:
    """Into usage and metrics, at the end of a generation, of whose prompt so many tokens are `counted` already."""
    if timings is None:
        return
    prompt, cached, output = timings["prompt_n"], timings["cache_n"], timings["predicted_n"]
    meter.see(Started(0, prompt + cached - counted, cached))
    meter.see(
        Finished(
            id=0,
            reason="stop",
            prompt_tokens=prompt + cached,
            cached_tokens=cached,
            completion_tokens=output,
            prompt_s=timings["prompt_ms"] / 1000,
            decode_s=timings["predicted_ms"] / 1000,
            drafted_tokens=timings.get("draft_n", 0),
            accepted_tokens=timings.get("draft_n_accepted", 0),
        )
    )


class _Counted(NamedTuple):
    """Tokens of one generation until now."""

    prompt: int = 0
    output: int = 0


class _Work:
    """A request that llama-server answers. Entered, it is at work in a task, which leaving it cancels."""

    def __init__(self, request: Request, path: str, body: dict[str, Any]) -> None:
        self._request = request
        self._path = path
        self._body = body
        self._events: asyncio.Queue[bytes | Exception] = asyncio.Queue()
        self._peeked: bytes | Exception | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def whole(self) -> Response:
        """The answer in one object; raises ApiError and EngineError."""
        async with self._asked() as (response, meter, _):
            await response.aread()
            answers = response.json()  # a list where there were several prompts
            for one in answers if isinstance(answers, list) else [answers]:
                _count(meter, one.get("timings"))
            return Response(response.content, media_type="application/json")

    async def first(self) -> None:
        """Wait for the first event; raises what came instead of it."""
        self._peeked = await self._events.get()
        if isinstance(self._peeked, Exception):
            raise self._peeked

    async def chunks(self) -> AsyncIterator[bytes]:
        """The events as they come."""
        while event := self._peeked or await self._events.get():
            self._peeked = None
            if isinstance(event, Exception):
                yield b"data: " + msgspec.json.encode(error_of(event).body()) + b"\n\n"
                return
            yield event

    async def _read(self) -> None:
        """Put the events into the queue, and nothing after the last; those before the first are comments."""
        counted: dict[int, _Counted] = {}
        try:
            async with self._asked() as (response, meter, first):
                async for event in sent_events(response.aiter_bytes()):
                    if first.when() is not None and not event.data:
                        continue
                    first.reschedule(None)
                    _see(meter, event.data, counted)
                    self._events.put_nowait(event.raw)
                if first.when() is not None:
                    raise EngineError("engine_crashed", "the engine ended while it worked on this request")
        except Exception as error:
            self._events.put_nowait(error)
        else:
            self._events.put_nowait(b"")

    @asynccontextmanager
    async def _asked(self) -> AsyncIterator[tuple[httpx.Response, Meter, asyncio.Timeout]]:
        """The answer once it begins, and the timeout that its first event ends; raises ApiError and EngineError."""
        state = state_of(self._request)
        limits = state.serving.limits
        whole = asyncio.timeout(limits.request_timeout_s)
        try:
            async with whole, _admitted(self._request, state, self._body) as meter, state.engine.using() as engine:
                streamed = bool(self._body.get("stream"))
                first = asyncio.timeout(limits.first_token_timeout_s if streamed else None)
                async with first, _own_api(engine, self._path).asked(self._path, self._body) as response:
                    yield response, meter, first
        except TimeoutError:
            raise late_error(limits, whole=whole.expired()) from None


def _see(meter: Meter, data: str, counted: dict[int, _Counted]) -> None:
    """Count an event of a stream; `counted`: what is of its generations until now, by index."""
    if not data.startswith("{"):
        return
    event = json.loads(data)
    if event.get("stop") is not False:
        before = counted.get(event.get("index", 0), _Counted())
        _count(meter, event.get("timings"), before.prompt)
        return
    index, now = event["index"], _Counted(event["tokens_evaluated"], event["tokens_predicted"])
    before = counted.get(index, _Counted())
    counted[index] = now
    if not before.prompt:
        meter.see(Started(0, now.prompt, 0))
    if now.output > before.output:
        meter.see(Delta(id=0, text="", n_tokens=now.output - before.output))
