"""Reproducible randomness: prompts, arrivals and search order are functions of a seed. Nothing secret comes of it."""

from __future__ import annotations

import random
import secrets


def fresh_seed() -> int:
    """A seed that no earlier run had: a server that has seen a prompt answers it from its cache."""
    return secrets.randbits(32)


def seeded(*parts: int | str) -> random.Random:
    """A generator that gives the same for the same parts."""
    return random.Random("/".join(map(str, parts)))  # noqa: S311 (no secret)
