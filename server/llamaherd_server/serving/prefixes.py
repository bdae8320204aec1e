"""What of a prompt the log may tell: salted hashes of its beginning, by which requests that share one are known."""

from __future__ import annotations

import secrets
from hashlib import blake2b

BLOCK_CHARS = 256
BLOCK_TOKENS = 64
_MOST_BLOCKS = 512
_HASH_BYTES = 6
_SALT = secrets.token_bytes(16)  # in no file: what this process logged can be held against no guess later


def prefixes(prompt: str | list[int]) -> list[int]:
    """A number for each whole block of the prompt, 512 at most; it stands for the block and all before it."""
    size = BLOCK_CHARS if isinstance(prompt, str) else BLOCK_TOKENS
    found, last = list[int](), b""
    for end in range(size, min(len(prompt), size * _MOST_BLOCKS) + 1, size):
        block = prompt[end - size : end]
        data = block.encode(errors="surrogatepass") if isinstance(block, str) else repr(block).encode()
        last = blake2b(last + data, digest_size=_HASH_BYTES, key=_SALT).digest()
        found.append(int.from_bytes(last))
    return found
