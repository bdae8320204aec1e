"""Parser for server-sent events as llama-server writes them."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from typing import NamedTuple


class SentEvent(NamedTuple):
    """The raw bytes of an event, and its data, which is empty for a comment."""

    raw: bytes
    data: str


async def sent_events(pieces: AsyncIterable[bytes]) -> AsyncIterator[SentEvent]:
    """Yield the events of a body, each after its blank line, and at the end an unfinished one.

    Only \\n ends a line, because JSON may contain U+2028 and other line separators.
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
