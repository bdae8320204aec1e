"""A smaller model with the same vocabulary, which drafts tokens for the model to verify."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from llamaherd_server.gguf import GgufError, read_header, shape
from llamaherd_server.wire.engine_settings import Placement
from llamaherd_server.worker.lib import Log
from llamaherd_server.worker.vocabulary import Vocabulary
from llamaherd_server.worker.weights import ModelError, check_magic, load_weights

# Earlier tokens (unknown, BOS and so on) may differ: SPEC_VOCAB_CHECK_START_TOKEN_ID in llama.cpp
FIRST_COMPARED = 5


class DraftModel:
    """The draft model's weights, offloaded entirely if the model is offloaded at all. Raises ModelError."""

    def __init__(self, lib: Any, log: Log, path: str, placement: Placement, progress: Callable[[float], None]) -> None:
        check_magic(path)
        self.lib, self.log, self.path = lib, log, path
        layers = -1 if placement.gpu_layers else 0
        placement = msgspec.structs.replace(placement, gpu_layers=layers, cpu_moe_layers=0)
        self.handle = load_weights(lib, log, path, placement, progress)
        if lib.llama_model_is_recurrent(self.handle) or lib.llama_model_is_hybrid(self.handle):
            raise ModelError(f"draft {path} is recurrent and cannot drop rejected tokens: choose another draft model")
        self.vocab = lib.llama_model_get_vocab(self.handle)
        self.n_vocab = int(lib.llama_vocab_n_tokens(self.vocab))
        self.shape = None
        with suppress(GgufError):
            found = shape(read_header(Path(path)))
            self.shape = replace(found, slides=[False] * found.n_layers)  # its context is created with swa_full

    def adapt(self, context: Any) -> None:
        """Does nothing: LoRAs apply to the main model only."""

    def check_vocabulary(self, model: Vocabulary) -> None:
        """Raise ModelError at the first token whose text differs. engine/draft_model.py compared the headers before."""
        text = self.lib.llama_vocab_get_text
        for token in range(FIRST_COMPARED, min(self.n_vocab, model.n_vocab)):
            if (own := text(self.vocab, token)) != (other := text(model.vocab, token)):
                differing = f"token {token} is {own!r}, not {other!r}"
                raise ModelError(
                    f"draft {self.path} has a different vocabulary ({differing}): choose another draft model"
                )
