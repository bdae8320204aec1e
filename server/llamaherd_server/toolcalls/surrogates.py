"""Replaces unpaired surrogate escapes in JSON text by U+FFFD.

Models write such escapes, and strict parsers reject the text.
"""

from __future__ import annotations

import re

_HIGH, _LOW = r"\\u[dD][89abAB][0-9a-fA-F]{2}", r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_ESCAPE = re.compile(rf"{_HIGH}{_LOW}|({_HIGH}|{_LOW})|\\.", re.DOTALL)
# An escape at the end that may continue: incomplete, or the first half of a pair.
_UNFINISHED = re.compile(rf"(?<!\\)(?:\\\\)*((?:{_HIGH})?\\(?:u[0-9a-fA-F]{{0,3}})?|{_HIGH})\Z")
_REPLACEMENT = "\\ufffd"


def without_lone_surrogates(text: str) -> str:
    """Return the JSON text with unpaired surrogate escapes replaced."""
    return _ESCAPE.sub(lambda escape: _REPLACEMENT if escape[1] else escape[0], text)


class SurrogateFilter:
    """Replaces unpaired surrogate escapes in streamed text."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> str:
        """Add text and return what is now certain."""
        text = self._held + text
        unfinished = _UNFINISHED.search(text)
        end = unfinished.start(1) if unfinished else len(text)
        self._held = text[end:]
        return without_lone_surrogates(text[:end])

    def finish(self) -> str:
        """Return the text held back, after the last text."""
        text, self._held = self._held, ""
        return without_lone_surrogates(text)
