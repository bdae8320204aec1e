"""Server-sent events, as llama-server writes them."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from typing import NamedTuple


class SentEvent(NamedTuple):
    """An event as it came, and its data, which is empty for a comment."""

    raw: bytes
    data: str


async def sent_events(pieces: AsyncIterable[bytes]) -> AsyncIterator[SentEvent]:
    """The events of a body, each once its blank line has come, and what the end cuts off.

    Lines end with \\n alone: JSON may have U+2028 and the like as they are.
    """
    rest = b""
    async for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n\n")
        for event in whole:
            yield _event(event + b"\n\n")
    if rest:
        yield _event(rest)


def _event(raw: bytes) -> SentEvent:
    lines = raw.decode().split("\n")
    return SentEvent(raw, "\n".join(line[5:].removeprefix(" ") for line in lines if line.startswith("data:")))
