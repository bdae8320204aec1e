"""Client of a model hub, or of a web server: lists files with their sha256 and reads GGUF headers by range requests.

The hub's API: https://huggingface.co/docs/hub/api. A token is sent only to the hub, never to where it redirects.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import time
import urllib.error
import urllib.parse
from email.message import Message
from typing import Any

from ansible.module_utils.urls import open_url
from ansible_collections.llamaherd.llamaherd.plugins.module_utils.gguf import MAX_HEADER

TIMEOUT_S = 20
HEADER_S = 120  # for the whole header
LONGEST_WAIT_S = 30
MAX_LISTING = 1 << 26
_FIRST, _CHUNK = 1 << 20, 1 << 18


class HubError(Exception):
    """The repository or file is not available; the message is one line for the operator."""


class Hub:
    """A hub at `url`. `token` may be empty; messages name `variable` as where to set it. Methods raise HubError."""

    def __init__(self, url: str, token: str, variable: str = "llamaherd_model_hf_token") -> None:
        self.url, self.token, self.variable = url.rstrip("/"), token, variable

    def listing(self, repo: str, revision: str) -> tuple[str, list[dict[str, Any]]]:
        """Return the commit of `revision`, and path, size and sha256 of its files ("" if a file is in git itself)."""
        address = f"{self.url}/api/models/{repo}/revision/{urllib.parse.quote(revision, safe='')}?blobs=true"
        with self._open(address, f"{repo}@{revision}") as answer:
            text = answer.read(MAX_LISTING)
        try:
            found = json.loads(text)
            files = [
                {
                    "path": str(one["rfilename"]),
                    "size": int((one.get("lfs") or one).get("size") or 0),
                    "sha256": str((one.get("lfs") or {}).get("sha256") or (one.get("lfs") or {}).get("oid") or ""),
                }
                for one in found["siblings"]
            ]
            return str(found["sha"]), files
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HubError(f"{self.url} is not a hub's API ({error!r}): check llamaherd_model_hf_url") from None

    def address(self, repo: str, commit: str, path: str) -> str:
        return f"{self.url}/{repo}/resolve/{commit}/{urllib.parse.quote(path)}"

    def file(self, url: str, what: str) -> RemoteFile:
        return RemoteFile(self, url, what)

    def _open(self, url: str, what: str, span: str = "") -> Any:
        headers = {"Range": f"bytes={span}"} if span else {}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        for last in (False, True):
            try:
                return open_url(
                    url,
                    headers=headers,
                    unredirected_headers=["Authorization"],
                    http_agent="llamaherd",
                    timeout=TIMEOUT_S,
                )
            except urllib.error.HTTPError as error:
                wait = _wait_s(error.headers)
                if error.code != 429 or last or wait is None or wait > LONGEST_WAIT_S:
                    raise HubError(self._reason(error, what, wait)) from None
                time.sleep(wait)
            except (OSError, http.client.HTTPException) as error:
                raise HubError(f"{what}: {_host(url)} cannot be reached: {getattr(error, 'reason', error)}") from None
        raise AssertionError

    def _reason(self, error: urllib.error.HTTPError, what: str, wait: int | None) -> str:
        host, code = _host(error.url), error.headers.get("X-Error-Code", "")
        if error.code == 429:
            pause = "some minutes" if wait is None else f"{wait} s"
            return f"{what}: {host} limits requests (429): try again in {pause}"
        if code == "GatedRepo" or error.code == 403:
            return f"{what} is gated ({error.code}): accept its terms on {host}, and set {self.variable}"
        if error.code == 401:
            hint = f"check {self.variable}" if self.token else f"if it is private, set {self.variable}"
            return f"{what}: {host} has no such repository, or shows it to its members alone (401): {hint}"
        if error.code == 404:
            missing = {"RevisionNotFound": "revision", "EntryNotFound": "file"}.get(code, "repository")
            return f"{what}: {host} has no such {missing} (404)"
        return f"{what}: {host} answers {error.code} {error.reason}"


class RemoteFile(io.RawIOBase):
    """A remote file, of which only what is read is fetched: at most MAX_HEADER bytes, within HEADER_S.

    `size` is that of the whole file, or 0 if the server does not report it.
    """

    def __init__(self, hub: Hub, url: str, what: str) -> None:
        super().__init__()
        self._hub, self._url, self._what = hub, url, what
        self._content, self._at, self._deadline = bytearray(), 0, time.monotonic() + HEADER_S
        self.size = 0
        self._grow(_FIRST)

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (self._at if whence == os.SEEK_CUR else 0)
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._at + size
        while end > len(self._content) and len(self._content) < min(MAX_HEADER, self.size or MAX_HEADER):
            self._grow(max(end, 2 * len(self._content)))
        found = bytes(self._content[self._at : end])
        self._at += len(found)
        return found

    def _grow(self, end: int) -> None:
        """Fetch up to byte `end`. Raises HubError if that takes too long or returns nothing."""
        begin, end = len(self._content), min(end, MAX_HEADER)
        with self._hub._open(self._url, self._what, f"{begin}-{end - 1}") as answer:
            if answer.status == http.client.PARTIAL_CONTENT:
                self.size = int(answer.headers.get("Content-Range", "").rpartition("/")[2].strip("*") or 0)
            else:  # the server ignores ranges and sends everything, of which this reads a part
                self.size, begin = int(answer.headers.get("Content-Length") or 0), 0
                self._content.clear()
            while len(self._content) < end and (chunk := answer.read(min(_CHUNK, end - len(self._content)))):
                self._content += chunk
                if time.monotonic() > self._deadline:
                    raise HubError(f"{self._what}: its header did not arrive within {HEADER_S} s: try again")
        if len(self._content) <= begin:
            raise HubError(f"{self._what}: {_host(self._url)} sends nothing after byte {begin}")


def _host(url: str) -> str:
    return urllib.parse.urlsplit(url).netloc.rpartition("@")[2]


def _wait_s(headers: Message) -> int | None:
    """Return the seconds of Retry-After or of the hub's RateLimit ("api";r=0;t=55), or None without either."""
    found = re.search(r"^\s*(\d+)\s*$", headers.get("Retry-After") or "")
    found = found or re.search(r";\s*t=(\d+)", headers.get("RateLimit") or "")
    return int(found[1]) if found else None
