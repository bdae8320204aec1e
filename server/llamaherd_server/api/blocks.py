"""A reply as a sequence of blocks (text, reasoning, tool calls), as Anthropic's API and the Responses API stream it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from llamaherd_server.toolcalls.reply import CallBegin, Content, Parser, Piece, Reasoning
from llamaherd_server.wire.protocol import Delta

Kind = Literal["text", "reasoning", "call"]


@dataclass(slots=True)
class Block:
    """A block as generated so far. `id` and `name` are set for a tool call; its `text` is the call's arguments."""

    index: int
    kind: Kind
    id: str = ""
    name: str = ""
    text: str = ""


@dataclass(slots=True)
class Blocks:
    """Collects the pieces of a reply into blocks."""

    done: list[Block] = field(default_factory=list)
    open: Block | None = None
    reasoning_tokens: int = 0

    def add(
        self, pieces: Iterable[Piece], n_tokens: int = 0
    ) -> Iterator[tuple[Literal["open", "more", "close"], Block, str]]:
        """Yield what happens to which block, and the added text. The `n_tokens` count towards the last open block."""
        for piece in pieces:
            if isinstance(piece, CallBegin):
                yield from self.close()
                self.open = Block(len(self.done), "call", piece.id, piece.name)
                yield "open", self.open, ""
                continue
            kind: Kind = (
                "text" if isinstance(piece, Content) else "reasoning" if isinstance(piece, Reasoning) else "call"
            )
            if self.open is None or self.open.kind != kind:
                yield from self.close()
                self.open = Block(len(self.done), kind)
                yield "open", self.open, ""
            self.open.text += piece.text
            yield "more", self.open, piece.text
        if self.open is not None and self.open.kind == "reasoning":
            self.reasoning_tokens += n_tokens

    def close(self) -> Iterator[tuple[Literal["close"], Block, str]]:
        """Close the open block, if any."""
        if self.open is not None:
            self.done.append(self.open)
            closed, self.open = self.open, None
            yield "close", closed, ""


def blocks_of(deltas: Iterable[Delta], parser: Parser) -> Blocks:
    """Return the blocks of a complete reply. `parser` must be new."""
    blocks = Blocks()
    for delta in deltas:
        deque(blocks.add(parser.feed(delta.text), delta.n_tokens), maxlen=0)
    deque(blocks.add(parser.finish()), maxlen=0)
    deque(blocks.close(), maxlen=0)
    return blocks
