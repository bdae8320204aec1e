"""Converts token bytes to text, without partial characters and without the start of a possible stop string."""

from __future__ import annotations

import codecs


class TextStream:
    """The output of one request: takes token bytes and returns the text that is safe to send."""

    def __init__(self, stops: list[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stop: str | None = None

    def feed(self, piece: bytes) -> str:
        """Return the text that may be sent now. Sets `stop` once a stop string is complete; no text follows it."""
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
        """Return the text held back so far, after the last token; a partial character is dropped."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, marker: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `marker`."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if marker.startswith(text[-n:])), 0)


def piece_text(piece: bytes) -> str | list[int]:
    """Return a token's text, or its bytes as numbers if it is not valid UTF-8."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return [*piece]
