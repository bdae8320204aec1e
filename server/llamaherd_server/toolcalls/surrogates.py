"""Escaped halves of surrogate pairs in JSON text: models write them, and strict readers refuse such text.

Where the other half is missing, the character U+FFFD takes the place of the escape.
"""

from __future__ import annotations

import re

_HIGH, _LOW = r"\\u[dD][89abAB][0-9a-fA-F]{2}", r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_ESCAPE = re.compile(rf"{_HIGH}{_LOW}|({_HIGH}|{_LOW})|\\.", re.DOTALL)
# An escape at the end that may go on: unfinished, or the first half of a pair.
_UNFINISHED = re.compile(rf"(?<!\\)(?:\\\\)*((?:{_HIGH})?\\(?:u[0-9a-fA-F]{{0,3}})?|{_HIGH})\Z")
_REPLACEMENT = "\\ufffd"


def without_halves(text: str) -> str:
    """The JSON text, whole in that no escape is half a character."""
    return _ESCAPE.sub(lambda escape: _REPLACEMENT if escape[1] else escape[0], text)


class Whole:
    """The same for text that comes in pieces."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> str:
        """What is certain now."""
        text = self._held + text
        unfinished = _UNFINISHED.search(text)
        end = unfinished.start(1) if unfinished else len(text)
        self._held = text[end:]
        return without_halves(text[:end])

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        text, self._held = self._held, ""
        return without_halves(text)
