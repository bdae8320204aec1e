"""Checks that a draft model has the vocabulary of its target model; otherwise llama-server drafts nothing."""

from __future__ import annotations

from pathlib import Path

from llamaherd_server.config.settings import SettingsError
from llamaherd_server.gguf import GgufError, read_header

_PREFIX = "tokenizer.ggml."
_COUNT = f"{_PREFIX}tokens.length"
_MAX_SIZE_DIFFERENCE = 128  # tokens: SPEC_VOCAB_MAX_SIZE_DIFFERENCE in llama.cpp's common/speculative.cpp


def check_vocabulary(model: Path, draft: Path) -> None:
    """Compare the vocabularies in the GGUF headers; raises SettingsError that names the differences."""
    try:
        headers = main, other = read_header(model), read_header(draft)
    except (GgufError, OSError) as error:
        raise SettingsError(f"draft {draft}: {error}") from None
    counts = [int(str(header.get(_COUNT, 0))) for header in headers]
    added = [name for name in ("bos", "eos") if any(header.get(f"{_PREFIX}add_{name}_token") for header in headers)]
    same = [_PREFIX + key for key in ("model", *(f"{name}_token_id" for name in added))]
    differing = [f"{key} is {other.get(key)}, not {main.get(key)}" for key in same if other.get(key) != main.get(key)]
    if abs(counts[0] - counts[1]) > _MAX_SIZE_DIFFERENCE:
        differing.append(f"it has {counts[1]} tokens, not {counts[0]}")
    if differing:
        raise SettingsError(
            f"draft {draft} has a different vocabulary ({'; '.join(differing)}): choose another draft model"
        )
