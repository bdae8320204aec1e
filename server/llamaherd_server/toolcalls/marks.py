"""Markers of chat templates, and what stands for a part of their text that differs from call to call."""

from __future__ import annotations

import re

ID, NUMBER, NAME, KEY = "\0", "\1", "\2", "\3"  # a call's id, its number, its tool's name; a parameter's name
MARK = re.compile(r"\]<\]\w+\[>\[|<[^<>\s]+>|\[[A-Z_/]+\]")
# A mark, with the words and the mark behind it where words stand between two: `<|open|>think<|sep|>`.
UNIT = re.compile(rf"(?:{MARK.pattern})(?:[^<>\[\]\n]*\w[^<>\[\]\n]*(?:{MARK.pattern}))?")


def units(text: str) -> list[str]:
    return [found[0] for found in UNIT.finditer(text)]


def control_tokens(text: str) -> list[str]:
    """The tokens that a marker may consist of."""
    return MARK.findall(text) or [text.strip()]
