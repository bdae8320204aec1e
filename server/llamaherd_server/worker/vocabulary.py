"""A GGUF's vocabulary: converts text to tokens and back. Needs no weights."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from functools import cache, cached_property, lru_cache
from itertools import pairwise
from typing import Any

# llama.cpp's time for a text grows with the square of its special tokens, so long texts are tokenised in pieces.
PIECE_CHARS = 2**13
CACHED_PIECES = 2**13  # tokens whose bytes are cached
_MAX_CHARS_PER_TOKEN = 16  # which few texts exceed
_OPENING, _LAST_BORDERS = 64, 3  # first tokens to search for a message's opener, last borders to return
LLAMA_VOCAB_TYPE_SPM, LLAMA_VOCAB_TYPE_BPE = 1, 2


class Vocabulary:
    """The vocabulary of the model `handle`, which may have been loaded without weights."""

    def __init__(self, lib: Any, handle: Any) -> None:
        self.lib = lib
        self.handle = handle
        self.vocab = lib.llama_model_get_vocab(handle)
        self.n_vocab = int(lib.llama_vocab_n_tokens(self.vocab))
        self.eog_tokens = frozenset(t for t in range(self.n_vocab) if lib.llama_vocab_is_eog(self.vocab, t))
        self._pieces: dict[int, bytes] = {}

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        pieces = [text] if len(text) <= PIECE_CHARS else self.parts(text, PIECE_CHARS, parse_special=parse_special)
        if len(pieces) == 1:
            return self._tokens(text, add_special, parse_special)
        head, tail = self.ends if add_special else ([], [])
        return [*head, *(token for one in pieces for token in self._tokens(one, False, parse_special)), *tail]

    def parts(self, text: str, apart: int, *, parse_special: bool) -> list[str]:
        """Split the text where special tokens begin, into parts of at least `apart` characters but for the last.

        llama.cpp tokenises the text between special tokens independently.
        """
        cuts = [0]
        if special := self._cuttable(parse_special):
            while match := special.search(text, cuts[-1] + apart):
                cuts.append(match.start())
        return [text[at:end] for at, end in pairwise([*cuts, len(text)])]

    def warm_up(self) -> None:
        """Fill the caches that all later calls use."""
        for parse in (True, False):
            self.tokenize(" " * (PIECE_CHARS + 1), add_special=True, parse_special=parse)
            self.least_tokens("", 0, parse_special=parse)

    @lru_cache(CACHED_PIECES)  # noqa: B019 (a process has one vocabulary)
    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Return the bytes of a token; empty for a control token unless `special`."""
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = self.lib.llama_token_to_piece(self.vocab, token, buffer, room, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            room = -count

    def control_tokens(self, texts: list[str]) -> Iterator[int]:
        """Yield the token of each text that is a single token."""
        for text in texts:
            tokens = self.tokenize(text, add_special=False, parse_special=True)
            if len(tokens) == 1:
                yield tokens[0]

    def pieces_of(self, tokens: list[int]) -> list[bytes]:
        """Return the bytes of each token, which may be part of a character."""
        for token in {*tokens} - self._pieces.keys():
            self._pieces[token] = self.piece(token, special=True)
        return [*map(self._pieces.__getitem__, tokens)]

    def detokenize(self, tokens: list[int]) -> str:
        return b"".join(self.pieces_of(tokens)).decode(errors="replace")

    def borders(self, tokens: list[int]) -> list[int]:
        """Return lengths at which chat messages begin: before each occurrence of the first control token that repeats.

        Of many, only the first, where a system prompt ends, and the last, where a next turn or another answer begins.
        """
        control = (one for one in dict.fromkeys(tokens[:_OPENING]) if self.lib.llama_vocab_is_control(self.vocab, one))
        for opener in control:
            at = [i for i, one in enumerate(tokens) if i and one == opener]
            if at and (len(at) > 1 or tokens[0] == opener):
                return sorted({at[0], *at[-_LAST_BORDERS:]})
        return []

    def unknown(self, tokens: list[int]) -> int | None:
        """Return the first of `tokens` that is not in the vocabulary."""
        return next((token for token in tokens if not 0 <= token < self.n_vocab), None)

    def least_tokens(self, text: str, most: int, *, parse_special: bool) -> int:
        """Return a lower bound on the text's number of tokens, to compare with `most`.

        It follows from the longest token or, for a long text, from its prefix. 0 if the vocabulary leaves out text.
        """
        if self.lib.llama_vocab_type(self.vocab) not in (LLAMA_VOCAB_TYPE_SPM, LLAMA_VOCAB_TYPE_BPE):
            return 0
        least = len(text.encode()) // self._longest
        prefix_chars = max(PIECE_CHARS, _MAX_CHARS_PER_TOKEN * most)
        if least <= most and len(text) > 2 * prefix_chars:
            # The text that follows may merge with the last tokens, but never with half of them.
            tokens = self.tokenize(text[:prefix_chars], add_special=False, parse_special=parse_special)
            least = max(least, len(tokens) // 2)
        return least

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of every token."""
        return [self.piece(token, special=True) for token in range(self.n_vocab)]

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.pieces))

    @cached_property
    def suppressed(self) -> list[int]:
        """Tokens that the GGUF forbids."""
        count = ctypes.c_int32()
        tokens = self.lib.llama_vocab_get_suppress_tokens(self.vocab, ctypes.byref(count))
        return list(tokens[: count.value]) if count.value else []

    def _tokens(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode()
        room = len(data) + 16
        while True:
            tokens = (ctypes.c_int32 * room)()
            count = self.lib.llama_tokenize(self.vocab, data, len(data), tokens, room, add_special, parse_special)
            if count >= 0:
                return tokens[:count]
            room = -count

    @cache  # noqa: B019 (a process has one vocabulary)
    def _cuttable(self, parse_special: bool) -> re.Pattern[str] | None:
        """A pattern of the special tokens that overlap no other one and leave the text before them unchanged."""
        lib = self.lib
        control = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_UNKNOWN
        wanted = lib.LLAMA_TOKEN_ATTR_USER_DEFINED | (control if parse_special else 0)
        attributes = {
            (lib.llama_vocab_get_text(self.vocab, token) or b"").decode(errors="replace"): found
            for token in range(self.n_vocab)
            if (found := lib.llama_vocab_get_attr(self.vocab, token)) & wanted
        }
        texts = [*filter(None, attributes)]
        firsts, later = {text[0] for text in texts}, {char for text in texts for char in text[1:]}
        alone = [one for one in texts if one[0] not in later and not firsts & {*one[1:]}]
        cuttable = sorted(
            (one for one in alone if not attributes[one] & lib.LLAMA_TOKEN_ATTR_LSTRIP), key=len, reverse=True
        )
        return re.compile("|".join(map(re.escape, cuttable))) if cuttable else None

    @cached_property
    def ends(self) -> tuple[list[int], list[int]]:
        """The tokens that the model expects before and after a text."""
        both = self._tokens("", True, False)
        if len(both) == 1 and both[0] != self.lib.llama_vocab_bos(self.vocab):
            return [], both
        return both[:1], both[1:]
