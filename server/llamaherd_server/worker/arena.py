"""A size-limited memory area for blobs. It outlives the process that writes it as long as another one holds `fd`.

Offsets come from an address range much larger than the limit, so every blob is contiguous in spite of fragmentation.
Freed pages are returned to the system. An index at the front lists the completed blobs. It is written with a checksum,
alternately to two places, so a writer that is killed in the middle leaves the previous index intact.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import tempfile
import zlib
from typing import Any

_PAGE = 1 << 16
_HALF = 1 << 20
_INDEX_BYTES = 2 * _HALF
_HEAD = struct.Struct("<QII")  # turn, blobs, checksum
_ENTRY = struct.Struct("<QQ")  # offset, bytes
_MAX_BLOBS = (_HALF - _HEAD.size) // _ENTRY.size
_RANGE_RATIO = 16  # ratio of address range to limit
CAN_PUNCH = hasattr(mmap, "MADV_REMOVE")  # whether freed pages are returned to the system immediately


def create(size: int) -> int:
    """Return a file descriptor of memory for an Arena of `size` bytes. Pages are allocated on first use."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("llamaherd-prompts")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, _INDEX_BYTES + _RANGE_RATIO * max(size, _PAGE))
    return fd


class Arena:
    """At most `size` bytes are in use. `blobs` maps the offset of each indexed blob to its size. Not thread-safe."""

    def __init__(self, fd: int, size: int) -> None:
        self.size = size
        self.used = 0
        self.blobs: dict[int, int] = {}
        self._map = mmap.mmap(fd, os.fstat(fd).st_size)
        self._allocated: dict[int, int] = {}
        self._turn = 0
        self._read_index()

    def fits(self, size: int) -> bool:
        """Whether the limit and the index leave room for another `size` bytes."""
        return self.used + _padded(size) <= self.size and len(self._allocated) < _MAX_BLOBS

    def allocate(self, size: int) -> int | None:
        """Reserve `size` bytes and return their offset, or None if they do not fit."""
        if not self.fits(size):
            return None
        size = _padded(size)
        start = _INDEX_BYTES
        for offset, allocated in sorted(self._allocated.items()):
            if offset - start >= size:
                break
            start = offset + allocated
        if start + size > len(self._map):
            return None
        self._allocated[start] = size
        self.used += size
        return start

    def commit(self, offset: int, size: int) -> None:
        """Add the first `size` bytes of the allocation at `offset` to the index as a completed blob."""
        self.blobs[offset] = size
        self._write_index()

    def free(self, offset: int) -> None:
        """Free the allocation at `offset`, whether or not it was committed."""
        if self.blobs.pop(offset, None) is not None:
            self._write_index()
        allocated = self._allocated.pop(offset)
        self.used -= allocated
        if CAN_PUNCH:
            self._map.madvise(mmap.MADV_REMOVE, offset, allocated)

    def view(self, offset: int, size: int) -> memoryview:
        return memoryview(self._map)[offset : offset + size]

    def address(self, offset: int, size: int) -> Any:
        """A ctypes array over the `size` bytes at `offset`, to pass to C."""
        return (ctypes.c_uint8 * size).from_buffer(self._map, offset)

    def _read_index(self) -> None:
        found: list[tuple[int, list[tuple[int, int]]]] = []
        for half in (0, _HALF):
            turn, count, checksum = _HEAD.unpack_from(self._map, half)
            body = bytes(self._map[half + _HEAD.size : half + _HEAD.size + min(count, _MAX_BLOBS) * _ENTRY.size])
            if turn and zlib.crc32(body) == checksum:
                found.append((turn, list(_ENTRY.iter_unpack(body))))
        if found:
            self._turn, entries = max(found)
            self.blobs = dict(entries)
            self._allocated = {offset: _padded(size) for offset, size in entries}
            self.used = sum(self._allocated.values())

    def _write_index(self) -> None:
        self._turn += 1
        body = b"".join(_ENTRY.pack(*entry) for entry in self.blobs.items())
        half = _HALF * (self._turn % 2)
        self._map[half + _HEAD.size : half + _HEAD.size + len(body)] = body
        _HEAD.pack_into(self._map, half, self._turn, len(self.blobs), zlib.crc32(body))


def _padded(size: int) -> int:
    return -(-size // _PAGE) * _PAGE
