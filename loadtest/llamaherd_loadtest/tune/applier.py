"""Puts settings in force on a running server, through /admin/engine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Protocol

import msgspec
import requests
from msgspec import Struct, field

from llamaherd_loadtest.probe import ServerUnusable
from llamaherd_loadtest.sse import Chunk, ErrorBody
from llamaherd_loadtest.tune.settings import Settings, Value, difference
from llamaherd_loadtest.tune.watch import EngineWatch

_APPLY_TIMEOUT_S = 180.0
_SWITCH_TIMEOUT_S = 960.0  # another engine loads the weights again
_RECOVERY_S = 90.0
_AUTOMATIC: Value = 0  # thread counts of 0 are resolved by the server, and come back as what it chose


class ModelInfo(Struct):
    name: str = ""
    path: str = ""
    size_bytes: int | None = None


class EngineState(Struct):
    """What GET /admin/engine says; `build` is None while it has no model.

    Its engine is one of the settings too: PUT takes them together.
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
    """Settings did not come into force; the message is the server's. `does_not_fit`: for want of memory."""

    def __init__(self, message: str, *, does_not_fit: bool = False) -> None:
        super().__init__(message)
        self.does_not_fit = does_not_fit


class Applier(Protocol):
    """How a tuner reaches a server's settings."""

    def state(self) -> EngineState: ...

    def apply(self, settings: Settings) -> None: ...

    def check(self, settings: Settings) -> None: ...

    def wait_ready(self) -> None: ...

    def watch(self) -> EngineWatch: ...


class AdminApplier:
    """Retunes a server alive through GET and PUT {url}/admin/engine."""

    def __init__(self, url: str, key: str = "", ca: Path | None = None) -> None:
        self._base = url.rstrip("/").removesuffix("/v1")
        self._url = self._base + "/admin/engine"
        self._session = requests.Session()
        self._session.verify = str(ca) if ca else True
        if key:
            self._session.headers["Authorization"] = f"Bearer {key}"

    def state(self) -> EngineState:
        """The engine's state. Raises ServerUnusable with the cause."""
        response = self._request("GET", timeout_s=10.0)
        if response.status_code in (401, 403):
            raise ServerUnusable(
                f"{self._url} refuses the admin key ({_error(response)}): give it with --admin-key-file"
            )
        if response.status_code != 200:
            raise ServerUnusable(f"{self._url} answers {response.status_code}: {_error(response)}")
        try:
            return msgspec.json.decode(response.content, type=EngineState)
        except msgspec.MsgspecError as error:
            raise ServerUnusable(f"{self._url} is no llamaherd server: {error}") from error

    def apply(self, settings: Settings) -> None:
        """Put settings in force and check that they are. Raises Refused; the server then keeps its old ones."""
        timeout_s = _SWITCH_TIMEOUT_S if "engine" in settings else _APPLY_TIMEOUT_S
        try:
            response = self._request("PUT", timeout_s=timeout_s, body=msgspec.json.encode(dict(settings)))
        except ServerUnusable as error:
            raise Refused(f"the server died when these settings were applied: {error}") from error
        if response.status_code != 200:
            raise Refused(_error(response), does_not_fit=_code(response) == "does_not_fit")
        found = msgspec.json.decode(response.content, type=EngineState).settings
        if other := _other(settings, found):
            raise Refused(f"the server did not take {difference(other, {name: settings[name] for name in other})}")

    def check(self, settings: Settings) -> None:
        """Raises ServerUnusable where other settings are in force than these, which were applied before."""
        if other := _other(settings, self.state().settings):
            raise ServerUnusable(
                f"{self._url} no longer has the settings that were being measured ({difference(settings, other)}): end "
                "what changes them, such as another tuner, and start again"
            )

    def wait_ready(self) -> None:
        """Wait for a server that died and is being restarted. Raises ServerUnusable if it does not come back."""
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
        """Sample the server's /metrics from now on."""
        return EngineWatch(self._session, self._base + "/metrics")

    def _request(self, method: str, *, timeout_s: float, body: bytes | None = None) -> requests.Response:
        headers = {"Content-Type": "application/json"}
        try:
            return self._session.request(method, self._url, data=body, headers=headers, timeout=timeout_s)
        except requests.exceptions.SSLError as error:
            raise ServerUnusable(
                f"{self._url} has a certificate of an unknown authority: give its CA with --ca"
            ) from error
        except requests.RequestException as error:
            raise ServerUnusable(f"{self._url} cannot be reached: {_innermost(error)}") from error


def _other(wanted: Settings, found: Settings) -> Settings:
    """Of `found`, what is not as `wanted`."""
    names = [name for name, value in wanted.items() if value != _AUTOMATIC and found.get(name) != value]
    return {name: found.get(name, "none") for name in names}


def _innermost(error: BaseException) -> BaseException:
    """What the system said, without the libraries' wrappings."""
    return _innermost(error.__context__) if error.__context__ else error


def _code(response: requests.Response) -> str | int | None:
    try:
        error = msgspec.json.decode(response.content, type=Chunk).error
    except msgspec.MsgspecError:
        return None
    return error.code if isinstance(error, ErrorBody) else None


def _error(response: requests.Response) -> str:
    try:
        message = msgspec.json.decode(response.content, type=Chunk).error_message
    except msgspec.MsgspecError:
        message = response.text.strip()
    return message[:300] or response.reason
