"""A double of the hub on loopback, as https://huggingface.co/docs/hub/api and huggingface_hub's client know it.

Repositories with commits, files with the sha256 of large ones, a resolve address that leads to another host for what is
in LFS, ranges, gated repositories and limits of requests.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Hub:
    """`files` by repository and path. `token`: what gated repositories ask for. `asked`: path, range, authorization."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    token: str = ""
    limited: list[dict[str, str]] = field(default_factory=list)  # the headers of 429s that come first
    ranges: bool = True
    page: bytes = b""  # instead of any answer
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    sent: int = 0
    url: str = ""
    storage: str = ""

    def answer(self, path: str, headers: Any) -> Answer:
        self.asked.append((path, headers.get("Range", ""), headers.get("Authorization", "")))
        if self.page:
            return 200, {}, self.page
        if self.limited:
            return 429, self.limited.pop(0), b""
        parts = urlsplit(path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", parts.path):
            return self._listing(found[1], unquote(found[2]), parts.query, headers)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", parts.path):
            return self._resolve(found[1], found[2], unquote(found[3]), headers)
        return 404, {}, b"Not Found"

    def _refused(self, repo: str, headers: Any) -> Answer | None:
        known = bool(self.token) and headers.get("Authorization") == f"Bearer {self.token}"
        if repo not in self.files:
            return (
                (404, {"X-Error-Code": "RepoNotFound"}, b"") if known else (401, {}, b"Invalid username or password.")
            )
        if repo in self.gated and not known:
            return 401, {"X-Error-Code": "GatedRepo"}, b"Access to model is restricted."
        return None

    def _listing(self, repo: str, revision: str, query: str, headers: Any) -> Answer:
        if repo in self.files and revision not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if repo not in self.files and (refused := self._refused(repo, headers)):
            return refused  # what a gated repository has, anybody may see
        siblings: list[dict[str, Any]] = [{"rfilename": ".gitattributes", "size": 9, "blobId": "b"}]
        for path, content in self.files[repo].items():
            digest, size = hashlib.sha256(content).hexdigest(), len(content)
            siblings.append({"rfilename": path, "size": size, "blobId": "b"})
            if path.endswith(".gguf"):
                siblings[-1]["lfs"] = {"sha256": digest, "size": size, "pointerSize": 135}
        if query != "blobs=true":
            siblings = [{"rfilename": one["rfilename"]} for one in siblings]
        return 200, {}, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode()

    def _resolve(self, repo: str, revision: str, path: str, headers: Any) -> Answer:
        if refused := self._refused(repo, headers):
            return refused
        if revision not in ("main", COMMIT) or path not in self.files[repo]:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        content = self.files[repo][path]
        more = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"'}
        return 302, {"Location": f"{self.storage}/{repo}/{path}?signature=x", "X-Repo-Commit": COMMIT, **more}, b""

    def stored(self, path: str, headers: Any) -> Answer:
        """From where the files of LFS lie, whose address says all that is needed."""
        self.asked.append((path, headers.get("Range", ""), headers.get("Authorization", "")))
        owner, name, file = urlsplit(path).path[1:].split("/", 2)
        content = self.files[f"{owner}/{name}"][file]
        if not self.ranges or not headers.get("Range"):
            return 200, {}, content
        start, end = (int(word) for word in headers["Range"].removeprefix("bytes=").split("-"))
        span = content[start : end + 1]
        return 206, {"Content-Range": f"bytes {start}-{start + len(span) - 1}/{len(content)}"}, span


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub and its storage on two ports of loopback."""
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub, answer)) for answer in (hub.answer, hub.stored)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url, hub.storage = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()


def _handler(hub: Hub, answer: Any) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = answer(self.path, self.headers)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                for start in range(0, len(body), 1 << 16):
                    self.wfile.write(body[start : start + (1 << 16)])
                    hub.sent += len(body[start : start + (1 << 16)])
            except ConnectionError:
                pass  # it has what it wants

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
