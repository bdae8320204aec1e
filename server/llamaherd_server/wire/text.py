"""Bytes of tokens into text: never half a character, never the beginning of what may become a stop string."""

from __future__ import annotations

import codecs


class TextStream:
    """One request's output. Feed it token bytes; it gives back the text that is safe to send."""

    def __init__(self, stops: list[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stop: str | None = None

    def feed(self, piece: bytes) -> str:
        """Text that may be sent now; `stop` is set, and nothing follows, once a stop string is complete."""
        text = self._held + self._decoder.decode(piece)
        if not self._stops:
            return text
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, self.stop = min(found)
            self._held = ""
            return text[:at]
        keep = max(overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, when no more tokens come; half a character is dropped."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, marker: str) -> int:
    """The length of the longest end of `text` that `marker` begins with."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if marker.startswith(text[-n:])), 0)


def piece_text(piece: bytes) -> str | list[int]:
    """A token's text; part of a character as its bytes."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return [*piece]
