"""Pieces of computed prompts, each continuing its parent, and the search for the longest cached prefix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llamaherd_server.worker.prefix import common
from llamaherd_server.worker.prompt_files import Header


@dataclass(eq=False, slots=True)
class Piece:
    """The state of the positions from `start` to `end`. Without an `offset` it is only on disk, at `path`."""

    header: Header
    parent: Piece | None
    size: int
    offset: int | None = None
    path: Path | None = None
    children: list[Piece] = field(default_factory=list)
    used: float = 0.0
    pins: int = 0
    fetched: bool = False  # read from disk, and not used since

    @property
    def start(self) -> int:
        return self.header.start

    @property
    def end(self) -> int:
        return self.header.start + len(self.header.tokens)


@dataclass(frozen=True, slots=True)
class Found:
    """A cached prefix of `length` tokens: the pieces from the root on, each used up to where the next one begins.

    `checkpoint`: the index of the last piece's checkpoint to rewind to; None: not needed.
    """

    length: int
    pieces: list[Piece]
    checkpoint: int | None = None

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)

    @property
    def fetched(self) -> bool:
        return any(piece.fetched for piece in self.pieces)

    @property
    def on_disk(self) -> bool:
        return any(piece.offset is None for piece in self.pieces)


def longest_hit(pieces: Iterable[Piece], tokens: list[int], most: int, *, cuts: bool, on_disk: bool) -> Found | None:
    """Find the longest prefix of `tokens`, of at most `most` tokens, that generation can continue from.

    `cuts`: it may end at any token of a piece. `on_disk`: it may include pieces that must be read from disk first.
    """
    best: Found | None = None
    for piece in pieces:
        if piece.offset is None and not on_disk:
            continue
        end = match_end(piece, tokens)
        own = _usable(piece, min(end, most), cuts=cuts)
        children = (one for one in piece.children if one.start <= end)
        deeper = longest_hit(children, tokens, most, cuts=cuts, on_disk=on_disk)
        if deeper and deeper.length > (own.length if own else 0):
            own = Found(deeper.length, [piece, *deeper.pieces], deeper.checkpoint)
        if own and (best is None or own.length > best.length):
            best = own
    return best


def _usable(piece: Piece, length: int, *, cuts: bool) -> Found | None:
    if length <= piece.start:
        return None
    if cuts or length == piece.end:
        return Found(length, [piece])
    for i, (position, _) in reversed([*enumerate(piece.header.checkpoints)]):
        if position <= length:
            return Found(position, [piece], i)
    return None


def best_match(pieces: Iterable[Piece], tokens: list[int]) -> tuple[Piece | None, int]:
    """Return the piece that matches the longest prefix of `tokens`, and the prefix's length."""
    best: tuple[Piece | None, int] = (None, 0)
    for piece in pieces:
        if (end := match_end(piece, tokens)) == piece.start:
            continue
        deeper = best_match((one for one in piece.children if one.start <= end), tokens)
        best = max(best, (piece, end), deeper, key=lambda pair: pair[1])
    return best


def lineage(piece: Piece | None) -> Iterator[Piece]:
    """Yield the piece and its ancestors, up to the root."""
    while piece:
        yield piece
        piece = piece.parent


def tokens_of(piece: Piece, start: int, end: int) -> list[int]:
    """The prompt's tokens from position `start` to `end`, which lie in the piece and its ancestors."""
    before = tokens_of(piece.parent, start, piece.start) if piece.parent and start < piece.start else []
    return before + piece.header.tokens[max(start - piece.start, 0) : end - piece.start]


def match_end(piece: Piece, tokens: list[int]) -> int:
    """The position up to which the piece matches `tokens`; its `start` if not at all."""
    if tokens[piece.start : piece.start + 1] != piece.header.tokens[:1]:  # rules out nearly all siblings cheaply
        return piece.start
    return piece.start + common(piece.header.tokens, tokens[piece.start : piece.end])
