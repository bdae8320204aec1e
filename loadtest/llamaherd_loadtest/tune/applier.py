"""Applies settings to a running server through /admin/engine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Protocol

import msgspec
from msgspec import Struct, field

from llamaherd_loadtest.admin import Admin, error_code, error_message
from llamaherd_loadtest.probe import ServerUnusable
from llamaherd_loadtest.tune.settings import Settings, Value, difference
from llamaherd_loadtest.tune.watch import EngineWatch

_ROUTE = "/admin/engine"
_APPLY_TIMEOUT_S = 180.0
_SWITCH_TIMEOUT_S = 960.0  # switching the engine reloads the weights
_RECOVERY_S = 90.0
_AUTOMATIC: Value = 0  # the server resolves thread counts of 0 and reports the counts it chose


class ModelInfo(Struct):
    name: str = ""
    path: str = ""
    size_bytes: int | None = None


class EngineState(Struct):
    """The response of GET /admin/engine; `build` is None while no model is loaded.

    The engine is also one of the settings, because PUT takes it among them.
    """

    engine: str
    state: str
    settings: dict[str, Value]
    model: ModelInfo = field(default_factory=ModelInfo)
    build: str | None = None
    restarts: int = 0

    def __post_init__(self) -> None:
        self.settings["engine"] = self.engine


class Refused(Exception):
    """The server did not apply settings; the message is the server's. `does_not_fit`: it lacked the memory."""

    def __init__(self, message: str, *, does_not_fit: bool = False) -> None:
        super().__init__(message)
        self.does_not_fit = does_not_fit


class Applier(Protocol):
    """A tuner's access to a server's settings."""

    def state(self) -> EngineState: ...

    def apply(self, settings: Settings) -> None: ...

    def check(self, settings: Settings) -> None: ...

    def wait_ready(self) -> None: ...

    def watch(self) -> EngineWatch: ...


class AdminApplier:
    """Reconfigures a running server through GET and PUT {url}/admin/engine."""

    def __init__(self, url: str, key: str = "", ca: Path | None = None) -> None:
        self._admin = Admin(url, key, ca)
        self._url = self._admin.base + _ROUTE

    def state(self) -> EngineState:
        """Return the engine's state. Raises ServerUnusable with the cause."""
        response = self._admin.request("GET", _ROUTE, timeout_s=10.0)
        if response.status_code in (401, 403):
            raise ServerUnusable(
                f"{self._url} refuses the admin key ({error_message(response)}): give it with --admin-key-file"
            )
        if response.status_code != 200:
            raise ServerUnusable(f"{self._url} answers {response.status_code}: {error_message(response)}")
        try:
            return msgspec.json.decode(response.content, type=EngineState)
        except msgspec.MsgspecError as error:
            raise ServerUnusable(f"{self._url} is not a llamaherd server: {error}") from error

    def apply(self, settings: Settings) -> None:
        """Apply settings and check that the server uses them. Raises Refused; the server then keeps its old ones."""
        timeout_s = _SWITCH_TIMEOUT_S if "engine" in settings else _APPLY_TIMEOUT_S
        try:
            response = self._admin.request("PUT", _ROUTE, timeout_s=timeout_s, body=msgspec.json.encode(dict(settings)))
        except ServerUnusable as error:
            raise Refused(f"the server crashed when these settings were applied: {error}") from error
        if response.status_code != 200:
            raise Refused(error_message(response), does_not_fit=error_code(response) == "does_not_fit")
        found = msgspec.json.decode(response.content, type=EngineState).settings
        if other := _other(settings, found):
            raise Refused(f"the server did not apply {difference(other, {name: settings[name] for name in other})}")

    def check(self, settings: Settings) -> None:
        """Check that the settings applied before are still current. Raises ServerUnusable if not."""
        if other := _other(settings, self.state().settings):
            raise ServerUnusable(
                f"{self._url} no longer has the settings that were being measured ({difference(settings, other)}): "
                "stop whatever changes them, such as another tuner, and start again"
            )

    def wait_ready(self) -> None:
        """Wait for a server that crashed and is restarting. Raises ServerUnusable if it does not come back."""
        deadline = time.monotonic() + _RECOVERY_S
        while True:
            try:
                state = self.state().state
            except ServerUnusable as error:
                state = str(error)
            if state == "ready":
                return
            if time.monotonic() > deadline:
                raise ServerUnusable(f"{self._url} did not come back within {_RECOVERY_S:g} s: {state}")
            time.sleep(0.5)

    def watch(self) -> EngineWatch:
        """Start sampling the server's /metrics."""
        return EngineWatch(self._admin.session, self._admin.base + "/metrics")


def _other(wanted: Settings, found: Settings) -> Settings:
    """Return those of the settings `found` that differ from `wanted`."""
    names = [name for name, value in wanted.items() if value != _AUTOMATIC and found.get(name) != value]
    return {name: found.get(name, "none") for name in names}
