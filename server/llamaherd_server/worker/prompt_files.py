"""Computed prompts as blobs, in memory and in files: the front end writes the files, a worker reads them.

A file is a SHA-256 checksum and the blob. It is written under a temporary name, then renamed to the blob's id.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from llamaherd_server.worker.arena import Arena
from llamaherd_server.worker.texts import Stretch

SUFFIX = ".prompt"
_CHECKSUM_BYTES = 32
_MAX_HEADER_BYTES = 1 << 26
_CHUNK = 1 << 24


class Header(msgspec.Struct, kw_only=True):
    """A blob's header. A blob: header length (8 bytes, big-endian), header (msgpack), state, checkpoint states."""

    id: str
    parent: str
    identity: str  # hash of everything that affects the state or its layout
    scope: str
    start: int
    tokens: list[int]
    state: int  # bytes
    checkpoints: list[tuple[int, int]]  # length, bytes
    used: float  # Unix time of its creation
    texts: list[Stretch] = []  # of the prompt, ending within `tokens`


def header_of(blob: memoryview | bytes, size: int | None = None) -> Header | None:
    """Decode the header of a blob of `size` bytes; `blob` must hold at least that header. None if it is invalid."""
    size = len(blob) if size is None else size
    head = int.from_bytes(blob[:8], "big")
    if head > min(_MAX_HEADER_BYTES, len(blob) - 8):
        return None
    try:
        header = msgspec.msgpack.decode(blob[8 : 8 + head], type=Header)
    except msgspec.MsgspecError:
        return None
    expected = 8 + head + header.state + sum(size for _, size in header.checkpoints)
    return header if expected == size and min(header.state, header.start) >= 0 else None


def prompt_files(folder: Path, identity: str) -> Iterator[tuple[Path, Header, int]]:
    """Yield the files of `folder` with this `identity`, their headers and blob sizes; delete all others."""
    for path, header, size in _files(folder):
        if header and header.identity == identity:
            yield path, header, size
        else:
            remove(path, "incomplete or damaged" if header is None else "of another model, build or setting")


def _files(folder: Path) -> Iterator[tuple[Path, Header | None, int]]:
    for path in sorted(folder.glob(f"*{SUFFIX}*")):
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size - _CHECKSUM_BYTES
                start = file.read(_CHECKSUM_BYTES + 8)[_CHECKSUM_BYTES:]
                head = min(int.from_bytes(start, "big"), _MAX_HEADER_BYTES)
                header = header_of(start + file.read(head), size) if path.suffix == SUFFIX else None
        except OSError as error:
            _log(f"cannot read {path}: {error.strerror}")
            continue
        yield path, header, size


def read(path: Path, blob: memoryview) -> bool:
    """Read a file's blob. Returns False if that fails; a file whose checksum does not match is deleted."""
    try:
        with path.open("rb") as file:
            checksum = file.read(_CHECKSUM_BYTES)
            count = file.readinto(blob)
    except OSError as error:
        _log(f"cannot read {path}: {error.strerror}")
        return False
    if count == len(blob) and _checksum(blob) == checksum:
        return True
    remove(path, "checksum mismatch")
    return False


def store(arena: Arena, folder: Path, most_bytes: int, within_s: float) -> None:
    """Add the arena's blobs to the files; keep the latest that fit, with ancestors, and delete the others.

    Writes nothing new after `within_s` seconds. Raises OSError if the folder is not writable.
    """
    until = time.monotonic() + within_s
    blobs: dict[str, tuple[Header, int, memoryview | None]] = {}
    for _, found, size in _files(folder):
        if found:
            blobs[found.id] = (found, size, None)
    for offset, size in arena.blobs.items():
        if found := header_of(view := arena.view(offset, size)):
            blobs.setdefault(found.id, (found, size, view))
    kept: set[str] = set()
    for header, _, _ in sorted(blobs.values(), key=lambda one: one[0].used, reverse=True):
        line = [header.id]
        while (parent := blobs[line[-1]][0].parent) in blobs:
            line.append(parent)
        new = [one for one in reversed(line) if one not in kept]
        size = sum(blobs[one][1] for one in new)
        late = time.monotonic() > until and any(blobs[one][2] for one in new)
        if parent or size > most_bytes or late:
            continue
        for one in new:
            if blob := blobs[one][2]:
                _write(folder / f"{one}{SUFFIX}", blob)
        kept.update(new)
        most_bytes -= size
    for path in folder.glob(f"*{SUFFIX}*"):
        if path.name.removesuffix(SUFFIX) not in kept:
            path.unlink(missing_ok=True)


def remove(path: Path, why: str) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)
    _log(f"removed {path}: {why}")


def _write(path: Path, blob: memoryview) -> None:
    new = path.with_suffix(f"{SUFFIX}.new")
    try:
        with open(new, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(_checksum(blob))
            for start in range(0, len(blob), _CHUNK):
                file.write(blob[start : start + _CHUNK])
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _checksum(blob: memoryview) -> bytes:
    return hashlib.sha256(blob).digest()  # most processors have instructions for it


def _log(line: str) -> None:
    sys.stderr.write(f"prompts: {line}\n")
