"""Markers of chat templates, and placeholders for the parts of their text that differ between calls."""

from __future__ import annotations

import re

ID, NUMBER, NAME, KEY = "\0", "\1", "\2", "\3"  # a call's id, its number, its tool's name; a parameter's name
MARK = re.compile(r"\]<\]\w+\[>\[|<[^<>\s]+>|\[[A-Z_/]+\]")
# A mark, or two marks with words between them: `<|open|>think<|sep|>`.
UNIT = re.compile(rf"(?:{MARK.pattern})(?:[^<>\[\]\n]*\w[^<>\[\]\n]*(?:{MARK.pattern}))?")


def units(text: str) -> list[str]:
    return [found[0] for found in UNIT.finditer(text)]


def control_tokens(text: str) -> list[str]:
    """Return the control tokens in a marker, or the whole marker if it contains none."""
    return MARK.findall(text) or [text.strip()]
