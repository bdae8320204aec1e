"""What the endpoints work with; one object for the life of the app."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request

from llamaherd_server.auth import Key
from llamaherd_server.chat.sandbox import Sandbox
from llamaherd_server.engine.base import Engine
from llamaherd_server.errors import ApiError
from llamaherd_server.generation import Serving
from llamaherd_server.lifecycle import Lifecycle
from llamaherd_server.protocol import ModelInfo
from llamaherd_server.settings import Settings


@dataclass(frozen=True, slots=True)
class AppState:
    """The parts of a running server."""

    settings: Settings
    serving: Serving
    lifecycle: Lifecycle
    sandbox: Sandbox

    @property
    def engine(self) -> Engine:
        return self.serving.engine

    @property
    def model_name(self) -> str:
        return self.settings.model.name

    def model_info(self) -> ModelInfo:
        """What the model says of itself; known since it was first loaded."""
        info = self.engine.status().model
        if info is None:
            raise ApiError(503, "the model is loading", code="model_loading", retry_after=5)
        return info

    def check_model(self, name: str | None, key: Key) -> None:
        """Raise the 404 for a model that is not served, the 403 for one that is not the key's."""
        if name is not None and name != self.model_name:
            message = f"model {name!r} is not served here: there is {self.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        if key.models is not None and self.model_name not in key.models:
            message = f"key {key.name!r} may not use model {self.model_name!r}"
            raise ApiError(403, message, param="model", code="model_not_allowed")


def state_of(request: Request) -> AppState:
    """The app's state."""
    state: AppState = request.app.state.llamaherd
    return state
