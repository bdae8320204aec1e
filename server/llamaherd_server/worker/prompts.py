"""Cache of computed prompts that have left their slots: in memory that outlives the worker, and on disk over a restart.

Prompts form a forest of pieces. A piece holds the state of some positions and continues its parent, so that a shared
prefix is stored once. Where llama.cpp copies only whole sequences (split KV, sliding windows), every piece begins at 0.
A state that cannot be cut back (recurrent layers, a sliding window) is usable only at the end of a piece and at its
checkpoints.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.worker.arena import Arena
from llamaherd_server.worker.backend import Checkpoint
from llamaherd_server.worker.pieces import Found, Piece, best_match, lineage, longest_hit, tokens_of
from llamaherd_server.worker.prompt_files import Header, header_of, prompt_files, read
from llamaherd_server.worker.texts import Stretch, Texts

MIN_TOKENS = 16  # tokens: shorter pieces and shorter shared prefixes are recomputed

_FORMAT = 1  # of blobs; others are not read


class PromptCache:
    """Thread-safe: the step thread stores and loads prompts while other threads read them from disk.

    `model` identifies everything that affects a state except the context's settings; call `suit` first to add those.
    """

    def __init__(self, arena: Arena, model: str, folder: Path | None = None) -> None:
        self.arena = arena
        self.identity = ""
        self.cuts = False
        self.evictions = 0
        self._model = model
        self._folder = folder
        self._roots: dict[tuple[str, str, tuple[int, ...]], list[Piece]] = {}
        self._pieces: dict[str, Piece] = {}
        self._lock = threading.RLock()
        self._reading = threading.Lock()
        self.texts = Texts()
        self._take_over(self._in_memory())

    def suit(self, settings: EngineSettings, *, cuts: bool) -> None:
        """Store and find only states of contexts with these settings from now on.

        `cuts`: such a context can cut a slot back to any length.
        """
        layout = (settings.kv_unified, settings.kv_type_k, settings.kv_type_v, settings.flash_attention)
        self.identity = hashlib.blake2b(repr((_FORMAT, self._model, layout)).encode(), digest_size=16).hexdigest()
        self.cuts = cuts
        if self._folder:
            files = prompt_files(self._folder, self.identity)
            self._take_over(Piece(header, None, size, path=path, used=header.used) for path, header, size in files)
            self._folder = None

    def find(self, scope: str, tokens: list[int], *, on_disk: bool = False) -> Found | None:
        """Return the longest usable prefix of `tokens`, leaving at least one token to compute.

        None if it is shorter than MIN_TOKENS. `on_disk`: it may include pieces that must be read from disk first.
        """
        with self._lock:
            found = longest_hit(self._roots_of(scope, tokens), tokens, len(tokens) - 1, cuts=self.cuts, on_disk=on_disk)
            return found if found and found.length >= MIN_TOKENS else None

    def lacks(self, scope: str, tokens: list[int], *, chained: bool) -> tuple[Piece | None, int] | None:
        """Return the parent and the start of a piece that would complete `tokens`; None if hardly any are missing."""
        with self._lock:
            parent, matched = best_match(self._roots_of(scope, tokens), tokens)
            if len(tokens) - matched < MIN_TOKENS:
                return None
            return (parent, matched) if chained and matched >= MIN_TOKENS else (None, 0)

    def put(
        self,
        scope: str,
        tokens: list[int],
        after: tuple[Piece | None, int],
        checkpoints: list[Checkpoint],
        save: Callable[[Callable[[int], Any]], int],
        *,
        texts: Iterable[Stretch] = (),
    ) -> bool:
        """Store the piece of `tokens` that begins at `after`, as from `lacks`.

        `save` requests a buffer of the state's size and fills it. Returns False if there is no room.
        """
        parent, start = after
        checkpoints = [one for one in checkpoints if start < one[0] < len(tokens)]
        header = Header(
            id=self._id(scope, tokens, start),
            parent=parent.header.id if parent else "",
            identity=self.identity,
            scope=scope,
            start=start,
            tokens=tokens[start:],
            state=0,
            checkpoints=[(length, len(state)) for length, state in checkpoints],
            used=time.time(),
            texts=[one for one in texts if start < one[2] <= len(tokens)],
        )
        room: list[tuple[int, bytes, int]] = []

        def buffer(size: int) -> Any:
            header.state = size
            head = msgspec.msgpack.encode(header)
            total = 8 + len(head) + size + sum(len(state) for _, state in checkpoints)
            offset = self._allocate(total, parent)
            if offset is None:
                return None
            room.append((offset, head, total))
            return self.arena.address(offset + 8 + len(head), size)

        with self._lock:
            if header.id in self._pieces:
                return True
            written = save(buffer)
            if not room:
                return False
            [(offset, head, total)] = room
            if not written:
                self.arena.free(offset)
                return False
            view = self.arena.view(offset, total)
            view[: 8 + len(head)] = len(head).to_bytes(8, "big") + head
            at = 8 + len(head) + header.state
            for _, state in checkpoints:
                view[at : at + len(state)] = state
                at += len(state)
            self.arena.commit(offset, total)
            piece = Piece(header, parent, total, offset, used=header.used)
            self._add(piece)
            if parent is None:
                self._drop_contained(piece)
            return True

    @contextlib.contextmanager
    def held(self, found: Found) -> Iterator[tuple[list[tuple[Any, int, int]], bytes | None, list[Checkpoint]]]:
        """Lock the cache while a prefix is loaded. Yields a list of (state, bytes, end position to use) for each piece,
        the partial state to rewind to, and all checkpoints up to there."""
        with self._lock:
            now = time.time()
            for piece in found.pieces:
                piece.used, piece.fetched = now, False
            ends = [*(piece.start for piece in found.pieces[1:]), found.length]
            states = [(*self._state(piece), end) for piece, end in zip(found.pieces, ends, strict=True)]
            passed = [
                (length, bytes(self._checkpoint(piece, i)))
                for piece, end in zip(found.pieces, ends, strict=True)
                for i, (length, _) in enumerate(piece.header.checkpoints)
                if length <= end
            ]
            back = None if found.checkpoint is None else bytes(self._checkpoint(found.pieces[-1], found.checkpoint))
            yield states, back, passed

    def fetch(self, scope: str, tokens: list[int]) -> None:
        """Read from disk the prefix that `find` would return if it were in memory; delete corrupt files."""
        while (found := self.find(scope, tokens, on_disk=True)) and found.on_disk:
            with self._pinned(found.pieces):
                failed = next((piece for piece in found.pieces if not self._read(piece)), None)
            if failed is None or failed.header.id in self._pieces:  # in memory, or no room for it
                return

    def fetch_latest(self, most_bytes: int) -> None:
        """Read the latest pieces from disk, up to `most_bytes` and without evicting any; `fetch` reads others."""
        with self._lock:
            pieces = sorted(self._pieces.values(), key=lambda one: one.used, reverse=True)
        for piece in [one for last in pieces for one in reversed([*lineage(last)])]:
            with self._lock:
                if piece.offset is not None or piece.header.id not in self._pieces:
                    continue
                most_bytes -= piece.size
                if most_bytes < 0 or not self.arena.fits(piece.size):
                    return
            with self._pinned([piece]):
                self._read(piece)

    @contextlib.contextmanager
    def _pinned(self, pieces: list[Piece]) -> Iterator[None]:
        with self._lock:
            for piece in pieces:
                piece.pins += 1
        try:
            yield
        finally:
            with self._lock:
                for piece in pieces:
                    piece.pins -= 1

    # --- the forest ----------------------------------------------------------------------------------------------

    def _roots_of(self, scope: str, tokens: list[int]) -> list[Piece]:
        """Root pieces that may hold a prefix of `tokens`."""
        return self._roots.get((self.identity, scope, tuple(tokens[:MIN_TOKENS])), [])

    def _add(self, piece: Piece) -> None:
        self._pieces[piece.header.id] = piece
        if piece.parent:
            piece.parent.children.append(piece)
        else:
            self._roots.setdefault(self._root_key(piece), []).append(piece)

    def _root_key(self, piece: Piece) -> tuple[str, str, tuple[int, ...]]:
        return piece.header.identity, piece.header.scope, tuple(piece.header.tokens[:MIN_TOKENS])

    def _drop(self, piece: Piece) -> None:
        for child in [*piece.children]:
            self._drop(child)
        del self._pieces[piece.header.id]
        if piece.parent:
            piece.parent.children.remove(piece)
        else:
            key = self._root_key(piece)
            self._roots[key].remove(piece)
            if not self._roots[key]:
                del self._roots[key]
        if piece.offset is not None:
            self.arena.free(piece.offset)

    def _drop_contained(self, whole: Piece) -> None:
        """Drop root pieces without children that `whole` contains entirely."""
        tokens = whole.header.tokens
        for piece in [*self._roots[self._root_key(whole)]]:
            free = piece is not whole and not piece.children and not piece.pins
            if free and piece.end < whole.end and tokens[: piece.end] == piece.header.tokens:
                self._drop(piece)

    def _allocate(self, size: int, keep: Piece | None) -> int | None:
        """Allocate `size` bytes, evicting the least worthy pieces but not `keep` and its ancestors; None: no room."""
        kept = {*lineage(keep)}
        while (offset := self.arena.allocate(size)) is None:
            leaves = [
                piece
                for piece in self._pieces.values()
                if piece.offset is not None
                and not piece.pins
                and piece not in kept
                and all(child.offset is None for child in piece.children)
            ]
            if size > self.arena.size or not leaves:
                return None
            least = min(leaves, key=self._worth())
            self.evictions += 1
            if least.path:
                self.arena.free(least.offset or 0)
                least.offset = None
            else:
                self._drop(least)
        return offset

    def _worth(self) -> Callable[[Piece], float]:
        """Score a piece: tokens saved per byte, divided by its idle time and, for fairness, by its scope's bytes."""
        now, taken = time.time(), Counter[str]()
        for piece in self._pieces.values():
            taken[piece.header.scope] += piece.size
        return lambda one: (one.end - one.start) / one.size / max(now - one.used, 1e-6) / taken[one.header.scope]

    def _id(self, scope: str, tokens: list[int], start: int) -> str:
        digest = hashlib.blake2b(digest_size=16)
        digest.update(msgspec.msgpack.encode((self.identity, scope, start, tokens)))
        return digest.hexdigest()

    def _state(self, piece: Piece) -> tuple[Any, int]:
        at = piece.size - piece.header.state - sum(size for _, size in piece.header.checkpoints)
        return self.arena.address((piece.offset or 0) + at, piece.header.state), piece.header.state

    def _checkpoint(self, piece: Piece, number: int) -> memoryview:
        size = piece.header.checkpoints[number][1]
        rest = sum(size for _, size in piece.header.checkpoints[number:])
        return self.arena.view((piece.offset or 0) + piece.size - rest, size)

    # --- pieces of earlier workers -------------------------------------------------------------------------------

    def _in_memory(self) -> Iterator[Piece]:
        """Yield the pieces that an earlier worker left in the arena; free invalid ones."""
        for offset, size in [*self.arena.blobs.items()]:
            if header := header_of(self.arena.view(offset, size)):
                yield Piece(header, None, size, offset, used=header.used)
            else:
                self.arena.free(offset)

    def _take_over(self, found: Iterable[Piece]) -> None:
        """Add earlier pieces whose parents are available too; free the others' memory."""
        for piece in sorted(found, key=lambda one: one.start):
            known, parent = self._pieces.get(piece.header.id), self._pieces.get(piece.header.parent)
            if known:
                known.path = piece.path
            elif parent or not piece.header.parent:
                piece.parent = parent
                self._add(piece)
                for digest, start, end in piece.header.texts:
                    self.texts.put(digest, tokens_of(piece, start, end))
            elif piece.offset is not None:
                self.arena.free(piece.offset)

    def _read(self, piece: Piece) -> bool:
        with self._reading:
            with self._lock:
                if piece.offset is not None:
                    return True
                known = piece.header.id in self._pieces
                offset = self._allocate(piece.size, piece.parent) if known else None
            if offset is None or piece.path is None:
                return False
            verified = read(piece.path, self.arena.view(offset, piece.size))  # without the lock: steps need it
            with self._lock:
                if verified:
                    self.arena.commit(offset, piece.size)
                    piece.offset, piece.fetched = offset, True
                else:
                    self.arena.free(offset)
                    self._drop(piece)
            return verified
