"""A reply as a row of blocks, of text, of reasoning, of a tool call each, which two of the APIs tell one by one."""

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
    """One block, as far as it has come; `id` and `name` are a call's, whose text is its arguments."""

    index: int
    kind: Kind
    id: str = ""
    name: str = ""
    text: str = ""


@dataclass(slots=True)
class Blocks:
    """Joins pieces to blocks."""

    done: list[Block] = field(default_factory=list)
    open: Block | None = None
    reasoning_tokens: int = 0

    def add(
        self, pieces: Iterable[Piece], n_tokens: int = 0
    ) -> Iterator[tuple[Literal["open", "more", "close"], Block, str]]:
        """What happens to which block, and the text that came of so many tokens, which count as the last one's."""
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
        """The end of the block that is open, if one is."""
        if self.open is not None:
            self.done.append(self.open)
            closed, self.open = self.open, None
            yield "close", closed, ""


def blocks_of(deltas: Iterable[Delta], parser: Parser) -> Blocks:
    """The blocks of a whole reply, read by a new `parser`."""
    blocks = Blocks()
    for delta in deltas:
        deque(blocks.add(parser.feed(delta.text), delta.n_tokens), maxlen=0)
    deque(blocks.add(parser.finish()), maxlen=0)
    deque(blocks.close(), maxlen=0)
    return blocks
