"""A client of a server's /admin routes, with the admin key and one-line errors."""

from __future__ import annotations

from pathlib import Path

import msgspec
import requests

from llamaherd_loadtest.probe import ServerUnusable
from llamaherd_loadtest.sse import Chunk, ErrorBody


class Admin:
    """`base` is the server's address without /v1."""

    def __init__(self, url: str, key: str = "", ca: Path | None = None) -> None:
        self.base = url.rstrip("/").removesuffix("/v1")
        self.session = requests.Session()
        self.session.verify = str(ca) if ca else True
        if key:
            self.session.headers["Authorization"] = f"Bearer {key}"

    def request(self, method: str, path: str, *, timeout_s: float, body: bytes | None = None) -> requests.Response:
        """Return the response, whatever its status. Raises ServerUnusable with the cause."""
        url, headers = self.base + path, {"Content-Type": "application/json"}
        try:
            return self.session.request(method, url, data=body, headers=headers, timeout=timeout_s)
        except requests.exceptions.SSLError as error:
            raise ServerUnusable(f"{url} has a certificate of an unknown authority: give its CA with --ca") from error
        except requests.RequestException as error:
            raise ServerUnusable(f"{url} cannot be reached: {_innermost(error)}") from error


def error_message(response: requests.Response) -> str:
    """Return the server's error message, at most 300 characters of it."""
    try:
        message = msgspec.json.decode(response.content, type=Chunk).error_message
    except msgspec.MsgspecError:
        message = response.text.strip()
    return message[:300] or response.reason


def error_code(response: requests.Response) -> str | int | None:
    """Return the code of the response's error object, or None."""
    try:
        error = msgspec.json.decode(response.content, type=Chunk).error
    except msgspec.MsgspecError:
        return None
    return error.code if isinstance(error, ErrorBody) else None


def _innermost(error: BaseException) -> BaseException:
    """Return the system's error from within the libraries' wrappers."""
    return _innermost(error.__context__) if error.__context__ else error
