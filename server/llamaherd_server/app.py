"""Assembles the FastAPI application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Security
from fastapi.middleware.cors import CORSMiddleware
from fastapi.security import APIKeyHeader, HTTPBearer

from llamaherd_server.api.anthropic import messages
from llamaherd_server.api.llamacpp import passed_on as llama_server
from llamaherd_server.api.llamacpp import rerank, tokenize
from llamaherd_server.api.openai import chat, completions, embeddings, models, responses, transcriptions, usage
from llamaherd_server.api.ops import evaluation, status_page
from llamaherd_server.api.ops import routes as ops
from llamaherd_server.api.state import AppState
from llamaherd_server.chat import template
from llamaherd_server.config.keys import KeyStore, Share
from llamaherd_server.config.settings import Settings, SettingsError
from llamaherd_server.engine.base import Engine
from llamaherd_server.engine.residence import Residence
from llamaherd_server.engine.switch import Switch
from llamaherd_server.errors import ApiError
from llamaherd_server.http import error_responses
from llamaherd_server.http.middleware import Gate, RequestContext
from llamaherd_server.sandbox.pool import Sandbox
from llamaherd_server.serving.admission import Admission
from llamaherd_server.serving.generation import Serving
from llamaherd_server.serving.ledger import Ledger
from llamaherd_server.serving.lifecycle import Lifecycle
from llamaherd_server.serving.metrics import Metrics
from llamaherd_server.serving.quota import RATE_HEADERS, Quotas

if TYPE_CHECKING:
    from llamaherd_server.http.traces import Traces

# Embedding requests passed to the engine at once, which may batch their inputs.
_EMBEDDINGS_AT_ONCE = 8
# Web pages served by this machine may call the API, whatever their port.
_THIS_MACHINE = r"https?://([a-z0-9.-]+\.)?(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
_POLL_S = 0.2
# The modules whose functions run in the sandbox.
SANDBOXED = ("llamaherd_server.chat.adapt", "llamaherd_server.toolcalls.tools")
# Only for the API documentation and its "Authorize" button; Gate authenticates requests.
_DOCUMENTED = [
    Security(HTTPBearer(auto_error=False, description="An API key, where the server has any.")),
    Security(APIKeyHeader(name="X-Api-Key", auto_error=False, description="The same, as llama-server's clients do.")),
]


def create_app(settings: Settings, make: Callable[[Settings], Engine]) -> FastAPI:
    """Return the app that serves all models of the settings; `make` creates their engines, the lifespan starts them.

    Raises KeysError if the keys cannot be read, SettingsError if the packages for traces are missing, and what `make`
    raises.
    """
    limits, path = settings.limits, settings.auth.keys_file
    keys = KeyStore(path, budgets=limits.usage_dir is not None) if path else None
    metrics, sandbox = Metrics(), Sandbox(modules=SANDBOXED)
    quotas = Quotas(lambda: keys.share if keys else Share(), settings.auth.instance)
    ledger = Ledger(limits.usage_dir, limits.usage_days)
    residence = Residence(limits.models_loaded)
    engines = [Switch(one, make, residence if one.model.residence == "on_demand" else None) for one in settings.each()]
    servings = [
        _serving(one, engine, quotas, ledger, metrics, keys=keys)
        for one, engine in zip(settings.each(), engines, strict=True)
    ]
    lifecycle = Lifecycle(servings, limits, metrics.totals, keys)
    states: dict[str, AppState] = {}
    for one, serving in zip(settings.each(), servings, strict=True):
        state = AppState(one, serving, lifecycle, sandbox, states, settings.loaded_at_once())
        states.update(dict.fromkeys((one.model.name, *one.model.aliases), state))
    app = FastAPI(
        title="llamaherd",
        docs_url="/docs",
        redoc_url=None,
        lifespan=partial(_lifespan, residence),
        redirect_slashes=False,
    )
    app.state.llamaherd = states[settings.model.name]
    app.state.traces = traces = _traces(settings, metrics)
    described: dict[int | str, dict[str, Any]] = {
        status: {"model": error_responses.ErrorBody} for status in ("4XX", "5XX")
    }
    for router in (
        chat.router,
        completions.router,
        messages.router,
        responses.router,
        transcriptions.router,
        embeddings.router,
        rerank.router,
        models.router,
        usage.router,
        tokenize.router,
        ops.router,
        evaluation.router,
        status_page.router,
        llama_server.router,
    ):
        app.include_router(router, responses=described, dependencies=_DOCUMENTED)
    error_responses.install(app)
    app.add_middleware(Gate, keys=keys, lifecycle=lifecycle, quotas=quotas, limits=limits, http=settings.http)
    app.add_middleware(RequestContext, metrics=metrics, trace=traces.record if traces else None)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.http.cors_origins,
        allow_origin_regex=_THIS_MACHINE,
        allow_methods=("*",),
        allow_headers=("*",),
        expose_headers=("X-Request-Id", "Retry-After", *RATE_HEADERS),
    )
    return app


def _serving(
    settings: Settings, engine: Switch, quotas: Quotas, ledger: Ledger, metrics: Metrics, *, keys: KeyStore | None
) -> Serving:
    """Create one model's admission queues and Serving."""
    limits = settings.limits
    holds = keys.holds if keys else lambda _: True
    admission = Admission(
        max_queue=limits.max_queue,
        max_queue_tokens=limits.max_queue_tokens,
        max_generations=limits.max_generations,
        timeout_s=limits.queue_timeout_s,
        parallel=settings.engine.settings.parallel,
        holds=holds,
        preempts=lambda: engine.status().kind == "embedded",
    )
    # Embeddings are computed in another context and need no slot, so they have their own fair, bounded queue.
    embedding = Admission(
        max_queue=limits.max_queue, timeout_s=limits.queue_timeout_s, parallel=_EMBEDDINGS_AT_ONCE, holds=holds
    )
    metrics.follow(settings.model.name, engine, admission)
    return Serving(engine, admission, embedding, quotas, ledger, metrics, settings.model.name, limits, settings.log)


def _traces(settings: Settings, metrics: Metrics) -> Traces | None:
    if settings.telemetry.otlp_endpoint is None:
        return None
    try:
        from llamaherd_server.http.traces import Traces  # noqa: PLC0415 (needs optional packages, which use memory)
    except ModuleNotFoundError as error:
        message = f"telemetry.otlp_endpoint needs {error.name}: install llamaherd-server[telemetry], or leave it out"
        raise SettingsError(message) from None
    return Traces(settings, metrics.registry)


async def _check_template(state: AppState) -> None:
    """Find out what the model's chat template can render, once the model is known and before the first chat."""
    while (model := state.engine.status().model) is None:  # noqa: ASYNC110 (loads have several causes and no event)
        await asyncio.sleep(_POLL_S)
    await template.check(state.sandbox, model, state.model_name)


@asynccontextmanager
async def _lifespan(residence: Residence, app: FastAPI) -> AsyncIterator[None]:
    """Start everything in the background, so that probes are answered while models load; stop it at the end."""
    state: AppState = app.state.llamaherd
    await state.sandbox.start()
    ledger = state.serving.ledger
    await ledger.start()
    work = (state.lifecycle.run(), *map(_check_template, state.all()), residence.run(), ledger.run())
    tasks = [asyncio.create_task(one) for one in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError, ApiError):
                await task
        await state.lifecycle.stop()
        await state.sandbox.stop()
        await ledger.close()
        if app.state.traces:
            await app.state.traces.close()
