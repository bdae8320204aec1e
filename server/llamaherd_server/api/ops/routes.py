"""For those who operate the server: /livez, /readyz, /metrics and /admin/engine."""

from __future__ import annotations

import asyncio
from typing import Any, get_args

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from llamaherd_server.api.answer import json_response
from llamaherd_server.api.routing import ModelRoute
from llamaherd_server.api.state import AppState, state_of
from llamaherd_server.config.engine_settings import merge
from llamaherd_server.config.settings import SettingsError
from llamaherd_server.engine.context_length import with_context_length
from llamaherd_server.errors import ApiError
from llamaherd_server.wire.engine_settings import EngineKind, EngineSettings

router = APIRouter(route_class=ModelRoute)

_SETTINGS = {
    "parallel": "Slots: sequences that run at once.",
    "batch": "Most tokens of a step; at least `parallel`.",
    "ubatch": "Most tokens that are computed at once; at most `batch`.",
    "ctx_per_slot": "Longest sequence, in tokens; 0: as decided at the start.",
    "kv_unified": "True: slots share the KV cells; false: each has its own.",
    "kv_cells": "KV cells that slots share, if fewer than all need; 0: as many as all need.",
    "kv_type_k": "Type of the keys in the KV cache.",
    "kv_type_v": "Type of the values; quantised ones need flash attention.",
    "flash_attention": "`auto`: where the device has it.",
    "threads": "Threads of a step that only decodes; 0: as this host has cores.",
    "threads_batch": "Threads of a step with a prompt; 0: as `threads`.",
    "speculative": "`ngram`: drafts from what a text repeats; `auto`: as far as that pays; `draft`: by the draft "
    "model; `mtp`: by the model's own head.",
    "speculative_depth": "Most tokens drafted for a sequence in a step.",
}


def _settings_body() -> dict[str, Any]:
    """The body of PUT /admin/engine for the documentation; no field is required."""
    _, components = msgspec.json.schema_components([EngineSettings])
    schema = components["EngineSettings"]
    for name, field in schema["properties"].items():
        field["description"] = _SETTINGS[name]
        del field["default"]
    schema["properties"]["engine"] = {"enum": list(get_args(EngineKind)), "description": "What computes."}
    return {"requestBody": {"content": {"application/json": {"schema": schema}}, "required": True}}


@router.get("/livez")
async def livez(request: Request) -> Response:
    """200 as long as the engine's step loop turns, 503 when it is wedged."""
    if state_of(request).lifecycle.alive():
        return json_response({"status": "ok"})
    raise ApiError(503, "the engine has not answered for too long", code="engine_wedged")


@router.get("/readyz")
@router.get("/health")
@router.get("/v1/health", include_in_schema=False)
async def readyz(request: Request) -> Response:
    """200 when requests are served; 503 while loading, restarting and shutting down."""
    state = state_of(request)
    if state.lifecycle.ready():
        return json_response({"status": "ok"})
    refusal = state.lifecycle.refusal()
    raise refusal or ApiError(503, "the engine is restarting", code="engine_restarting", retry_after=5)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    page = state_of(request).serving.metrics.page()
    return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/admin/engine")
async def engine(request: Request) -> Response:
    """The engine's state, settings and statistics."""
    return json_response(_describe(state_of(request)))


@router.put("/admin/engine", openapi_extra=_settings_body())
async def retune(body: dict[str, Any], request: Request) -> Response:
    """Put other settings in force, any subset, without reloading the weights; the old ones stay if these do not fit.

    Another `engine` does load them again; requests that are queued wait for it.
    """
    state = state_of(request)
    settings = {name: value for name, value in body.items() if name != "engine"}
    try:
        kind = msgspec.convert(body.get("engine", state.engine.status().kind), EngineKind)
        wanted = merge(state.engine.status().settings, settings)
        changed = state.settings.with_engine(kind, wanted)
        wanted = await asyncio.to_thread(with_context_length, changed, state.at_once)  # it may read the GGUF's header
    except msgspec.ValidationError:
        kinds = " or ".join(map(repr, get_args(EngineKind)))
        message = f"engine {body['engine']!r} is not known: set {kinds}"
        raise ApiError(400, message, param="engine", code="invalid_value") from None
    except (ValueError, SettingsError) as error:
        raise ApiError(400, str(error), code="invalid_value") from None
    applied = await state.engine.retune(wanted, kind)
    state.serving.admission.set_parallel(applied.parallel)
    return json_response(_describe(state))


def _describe(state: AppState) -> dict[str, Any]:
    status = state.engine.status()
    return {
        "engine": status.kind,
        "state": status.state,
        "model": {
            "name": state.model_name,
            "path": str(state.settings.model.path),
            "size_bytes": status.model.size_bytes if status.model else None,
        },
        "build": status.model.build if status.model else None,
        "placement": msgspec.to_builtins(status.model.placed) if status.model else None,
        "settings": msgspec.to_builtins(status.settings),
        "stats": msgspec.to_builtins(status.stats),
        "heartbeat_age_s": status.heartbeat_age_s,
        "restarts": status.restarts,
        "load_s": status.load_s,
        "loads": status.loads,
        "last_error": status.last_error,
    }
