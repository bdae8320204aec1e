"""Reproducible randomness: prompts, arrivals and search order are functions of a seed. Not for secrets."""

from __future__ import annotations

import random
import secrets


def fresh_seed() -> int:
    """Return a seed that no earlier run used, so that the server's prompt cache holds none of its prompts."""
    return secrets.randbits(32)


def seeded(*parts: int | str) -> random.Random:
    """Return a generator that yields the same sequence for the same parts."""
    return random.Random("/".join(map(str, parts)))  # noqa: S311 (no secret)
