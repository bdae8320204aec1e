"""What the endpoints work with: one object a model, for the life of the app."""

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
    """The parts of a running server, for one of its models.

    `models`: every name and alias with its own; `at_once`: how many of them are loaded at most.
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
        """Whether a chat may have images and the like."""
        return self.settings.model.mmproj is not None and self.engine.status().kind == "llama-server"

    def model_info(self) -> ModelInfo:
        """What the model says of itself; known since it was first loaded."""
        info = self.engine.status().model
        if info is None:
            raise ApiError(503, "the model is loading", code="model_loading", retry_after=5)
        return info

    def sampling_defaults(self) -> dict[str, Any]:
        """Fields of requests by name, where a request leaves them out: by the settings, else by the model."""
        return {**self.model_info().sampling, **self.settings.model.sampling}

    @property
    def fingerprint(self) -> str:
        """Another one where equal seeds may give other samples: another build, engine or model."""
        info = self.model_info()
        identity = f"{self.engine.status().kind} {info.build} {info.description} {info.n_params} {info.size_bytes}"
        return f"b{zlib.crc32(identity.encode()):08x}"

    def all(self) -> list[AppState]:
        """Every model's, once."""
        return [state for name, state in self.models.items() if name == state.model_name]

    def named(self, name: str, elsewhere: Sequence[str] = ()) -> AppState:
        """The model of that name or alias, or the one that has the alias "*".

        Raises the 404 that lists the names, and those of `elsewhere`.
        """
        if state := self.models.get(name) or self.models.get(ANY_NAME):
            return state
        names = dict.fromkeys((*elsewhere, *(state.model_name for state in self.all())))
        available = ", ".join(map(repr, names))
        message = f"unknown model {shown(name)}; available: {available}"
        raise ApiError(404, message, param="model", code="model_not_found")

    def check_model(self, name: str | None, key: Key) -> None:
        """Raise the 404 for a model that is not served, the 403 for one that is not the key's."""
        if name and self.named(name) is not self:
            raise ValueError(f"a request for {name!r} came to {self.model_name!r}")
        if key.models is not None and self.model_name not in key.models:
            message = f"key {key.name!r} may not use model {self.model_name!r}"
            raise ApiError(403, message, param="model", code="model_not_allowed")


def state_of(request: Request) -> AppState:
    """The state for the model that the request is for."""
    state: AppState = getattr(request.state, "model", request.app.state.llamaherd)
    return state


def fleet_models(request: Request) -> list[str]:
    """The models of all hosts, where an edge before unlike hosts lists them; what a client lists, only it reads."""
    values = ",".join(request.headers.getlist("x-llamaherd-models"))
    return [unquote(name) for name in values.split(",") if name]


async def choose_model(request: Request) -> None:
    """Send the request to the model that it names, in the body or the query; without a name, to the first one.

    Raises the 404 for an unknown name, and for a POST the 403 for a model that is not the key's and the 503 while that
    model loads. One on demand is loaded first where nothing could be read of it.
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
