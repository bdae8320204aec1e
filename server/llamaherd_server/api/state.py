"""The state that endpoints use: one object per model, created once per app."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from fastapi import Request

from llamaherd_server.config.keys import Key
from llamaherd_server.config.settings import ANY_NAME, Settings
from llamaherd_server.engine.switch import Switch
from llamaherd_server.errors import ApiError, shown
from llamaherd_server.http.json_body import json_of
from llamaherd_server.sandbox.pool import Sandbox
from llamaherd_server.serving.generation import Serving
from llamaherd_server.serving.lifecycle import Lifecycle
from llamaherd_server.wire.protocol import ModelInfo


@dataclass(frozen=True, slots=True)
class AppState:
    """The components of a running server, for one of its models.

    `models`: the state of every model, by name and alias; `at_once`: how many models are loaded at most.
    """

    settings: Settings
    serving: Serving
    lifecycle: Lifecycle
    sandbox: Sandbox
    models: dict[str, AppState] = field(repr=False)
    at_once: int

    @property
    def engine(self) -> Switch:
        return self.serving.engine

    @property
    def model_name(self) -> str:
        return self.settings.model.name

    @property
    def takes_media(self) -> bool:
        """Whether chats may contain images, audio or video."""
        return self.settings.model.mmproj is not None and self.engine.status().kind == "llama-server"

    def model_info(self) -> ModelInfo:
        """Return the model's metadata. Raises the 503 if it has not been read yet."""
        info = self.engine.status().model
        if info is None:
            raise ApiError(503, "the model is loading", code="model_loading", retry_after=5)
        return info

    def sampling_defaults(self) -> dict[str, Any]:
        """Return defaults for missing request fields, by name. The settings take precedence over the model's own."""
        return {**self.model_info().sampling, **self.settings.model.sampling}

    @property
    def fingerprint(self) -> str:
        """A hash of build, engine and model. Equal seeds may give different samples if it differs."""
        info = self.model_info()
        identity = f"{self.engine.status().kind} {info.build} {info.description} {info.n_params} {info.size_bytes}"
        return f"b{zlib.crc32(identity.encode()):08x}"

    def all(self) -> list[AppState]:
        """Return the state of each model once."""
        return [state for name, state in self.models.items() if name == state.model_name]

    def named(self, name: str, elsewhere: Sequence[str] = ()) -> AppState:
        """Return the state of the model with this name or alias, or of the one with the alias "*".

        Raises a 404 that lists the models, including those of other hosts in `elsewhere`.
        """
        if state := self.models.get(name) or self.models.get(ANY_NAME):
            return state
        names = dict.fromkeys((*elsewhere, *(state.model_name for state in self.all())))
        available = ", ".join(map(repr, names))
        message = f"unknown model {shown(name)}; available: {available}"
        raise ApiError(404, message, param="model", code="model_not_found")

    def check_model(self, name: str | None, key: Key) -> None:
        """Raise a 404 for a model that is not served, or a 403 for one that the key may not use."""
        if name and self.named(name) is not self:
            raise ValueError(f"a request for {name!r} came to {self.model_name!r}")
        if key.models is not None and self.model_name not in key.models:
            message = f"key {key.name!r} may not use model {self.model_name!r}"
            raise ApiError(403, message, param="model", code="model_not_allowed")


def state_of(request: Request) -> AppState:
    """Return the state of the request's model."""
    state: AppState = getattr(request.state, "model", request.app.state.llamaherd)
    return state


def fleet_models(request: Request) -> list[str]:
    """Return the models of all hosts. The edge sets the header if hosts differ; a client can only mislead itself."""
    values = ",".join(request.headers.getlist("x-llamaherd-models"))
    return [unquote(name) for name in values.split(",") if name]


async def choose_model(request: Request) -> None:
    """Select the model that the request names in its body or query; without a name, the first model.

    Raises a 404 for an unknown name. For a POST, raises a 403 if the key may not use the model, and a 503 while the
    model loads. A model on demand is loaded first if its metadata could not be read without loading it.
    """
    state = state_of(request)
    if name := await _model_of(request):
        state = request.state.model = state.named(name, fleet_models(request))
    request.state.log.models = (name or state.model_name, state.model_name)
    if request.method == "POST":
        state.check_model(None, request.state.key)
        if refusal := state.lifecycle.refusal(state.serving):
            raise refusal
        if state.engine.on_demand and state.engine.status().model is None:
            async with state.engine.held():
                pass


async def _model_of(request: Request) -> str | None:
    name: Any = request.query_params.get("model")
    if request.method == "POST":
        body = await json_of(request)
        name = body.get("model") if isinstance(body, dict) else None
    return name if isinstance(name, str) else None
