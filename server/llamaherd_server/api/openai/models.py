"""GET /v1/models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from llamaherd_server.api.routing import ModelRoute
from llamaherd_server.api.state import AppState, fleet_models, state_of
from llamaherd_server.config.settings import ANY_NAME
from llamaherd_server.toolcalls.formats import thinking_of

router = APIRouter(route_class=ModelRoute)


@router.get("/v1/models")
@router.get("/models", include_in_schema=False)
async def models(request: Request) -> dict[str, Any]:
    """The models that are served; behind an edge before unlike hosts, those of all hosts."""
    here = {state.model_name: state for state in state_of(request).all() if _is_known(state)}
    names = dict.fromkeys((*fleet_models(request), *(state.model_name for state in state_of(request).all())))
    return {"object": "list", "data": [_describe(here[name]) if name in here else _elsewhere(name) for name in names]}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> dict[str, Any]:
    """One of them."""
    return _describe(state_of(request).named(name, fleet_models(request)))


def _is_known(state: AppState) -> bool:
    return state.engine.status().model is not None or not state.engine.on_demand


def _elsewhere(name: str) -> dict[str, Any]:
    """All that this host knows of a model of another one, whose own answer has the rest, and of one not loaded yet."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "llamaherd"}


def _capabilities(state: AppState) -> list[str]:
    """What the model is good for, in llama-server's words and a few more."""
    info = state.model_info()
    if info.pooling == "rank":
        return ["rerank"]
    chats = ["chat", "tools", *(["reasoning"] if thinking_of(info.chat_template or "") else [])]
    media = ["multimodal"] if state.settings.model.mmproj else []
    return ["completion", *chats, *(["infill"] if info.fim else []), *media, "embeddings"]


def _describe(state: AppState) -> dict[str, Any]:
    status = state.engine.status()
    info = state.model_info()
    return {
        "id": state.model_name,
        "aliases": [alias for alias in state.settings.model.aliases if alias != ANY_NAME],
        "object": "model",
        "created": int(state.settings.model.path.stat().st_mtime),
        "owned_by": "llamaherd",
        "capabilities": _capabilities(state),
        "meta": {
            "n_ctx": status.settings.ctx_per_slot,
            "n_ctx_train": info.n_ctx_train,
            "n_params": info.n_params,
            "n_vocab": info.n_vocab,
            "n_embd": info.n_embd,
            "size": info.size_bytes,
        },
    }
