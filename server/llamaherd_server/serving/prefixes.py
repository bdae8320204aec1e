"""Salted hashes of prompt prefixes for the log: they identify requests that share a prefix without showing text."""

from __future__ import annotations

import secrets
from hashlib import blake2b

BLOCK_CHARS = 256
BLOCK_TOKENS = 64
_MAX_BLOCKS = 512
_HASH_BYTES = 6
_SALT = secrets.token_bytes(16)  # never stored, so that nobody can later test guessed prompts against the log


def prefixes(prompt: str | list[int]) -> list[int]:
    """Return a hash for each full block of the prompt, at most 512; it covers the block and all blocks before it."""
    size = BLOCK_CHARS if isinstance(prompt, str) else BLOCK_TOKENS
    found, last = list[int](), b""
    for end in range(size, min(len(prompt), size * _MAX_BLOCKS) + 1, size):
        block = prompt[end - size : end]
        data = block.encode(errors="surrogatepass") if isinstance(block, str) else repr(block).encode()
        last = blake2b(last + data, digest_size=_HASH_BYTES, key=_SALT).digest()
        found.append(int.from_bytes(last))
    return found
