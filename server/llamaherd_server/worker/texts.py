"""Caches the tokens of texts, so that a chat's next turn tokenises only its new text."""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections import OrderedDict
from dataclasses import dataclass
from typing import TypeAlias

from llamaherd_server.worker.vocabulary import Vocabulary

# Maximum characters of a prompt to look up, and minimum of its parts but the last one.
MAX_CHARS, PART_CHARS = 2**18, 256
MAX_TOKENS = 2**20  # in the cache, at 4 bytes each

Stretch: TypeAlias = tuple[bytes, int, int]
"""The digest of a text, and the start and end of its tokens in a prompt."""


class Texts:
    """Tokens by digest of their text, least recently used evicted first. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, array[int]] = OrderedDict()
        self._tokens = 0

    def get(self, digest: bytes) -> array[int] | None:
        with self._lock:
            if digest in self._known:
                self._known.move_to_end(digest)
            return self._known.get(digest)

    def put(self, digest: bytes, tokens: list[int]) -> None:
        with self._lock:
            if digest not in self._known:
                self._known[digest] = array("i", tokens)
                self._tokens += len(tokens)
            while self._tokens > MAX_TOKENS:
                self._tokens -= len(self._known.popitem(last=False)[1])


@dataclass(slots=True)
class SplitPrompt:
    """A prompt in parts that llama.cpp tokenises independently; those in `unknown` it has yet to tokenise."""

    parts: list[tuple[bytes, array[int] | str]]  # digest, and the tokens or, if unknown, the text
    ends: tuple[list[int], list[int]]

    @property
    def unknown(self) -> list[str]:
        return [part for _, part in self.parts if isinstance(part, str)]

    @property
    def known(self) -> int:
        """Number of tokens that are known already."""
        return sum(len(part) for _, part in self.parts if not isinstance(part, str)) + sum(map(len, self.ends))

    def whole(self, texts: Texts, tokens: list[list[int]]) -> tuple[list[int], list[Stretch]]:
        """Return all tokens and each part's stretch; adds the given tokens of the `unknown` parts to `texts`."""
        rest = iter(tokens)
        head, tail = self.ends
        whole, stretches = [*head], []
        for digest, part in self.parts:
            start = len(whole)
            if isinstance(part, str):
                whole += (new := next(rest))
                texts.put(digest, new)
            else:
                whole += part
            stretches.append((digest, start, len(whole)))
        return [*whole, *tail], stretches


def split_prompt(
    vocabulary: Vocabulary, texts: Texts, text: str, scope: str, *, add_special: bool, parse_special: bool
) -> SplitPrompt | None:
    """Split a text and look its parts up; None: tokenise it whole. Scopes do not see each other's texts."""
    if len(text) > MAX_CHARS:
        return None
    cut = vocabulary.parts(text, PART_CHARS, parse_special=parse_special)
    if len(cut) == 1:
        return None
    salt = hashlib.blake2b(f"{parse_special} {scope}".encode(), digest_size=16).digest()
    digests = [hashlib.blake2b(part.encode(), digest_size=16, key=salt).digest() for part in cut]
    parts = [(digest, texts.get(digest) or part) for digest, part in zip(digests, cut, strict=True)]
    return SplitPrompt(parts, vocabulary.ends if add_special else ([], []))
