"""A smaller model of the same vocabulary, whose guesses the model confirms or not."""

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

# Before it are unknown, BOS and the like, which may differ: SPEC_VOCAB_CHECK_START_TOKEN_ID in llama.cpp
FIRST_COMPARED = 5


class DraftModel:
    """Its weights, on an accelerator whole if the model's are there in part. Raises ModelError."""

    def __init__(self, lib: Any, log: Log, path: str, placement: Placement, progress: Callable[[float], None]) -> None:
        check_magic(path)
        self.lib, self.log, self.path = lib, log, path
        layers = -1 if placement.gpu_layers else 0
        placement = msgspec.structs.replace(placement, gpu_layers=layers, cpu_moe_layers=0)
        self.handle = load_weights(lib, log, path, placement, progress)
        if lib.llama_model_is_recurrent(self.handle) or lib.llama_model_is_hybrid(self.handle):
            raise ModelError(
                f"draft {path} has a recurrent state, which cannot be cut back to what came true: take another"
            )
        self.vocab = lib.llama_model_get_vocab(self.handle)
        self.n_vocab = int(lib.llama_vocab_n_tokens(self.vocab))
        self.shape = None
        with suppress(GgufError):
            found = shape(read_header(Path(path)))
            self.shape = replace(found, slides=[False] * found.n_layers)  # its context keeps all cells, to be cut back

    def adapt(self, context: Any) -> None:
        """Nothing: the LoRAs are the model's."""

    def check_vocabulary(self, model: Vocabulary) -> None:
        """Raises ModelError for the first token of another text. engine/draft_model.py has compared the headers."""
        text = self.lib.llama_vocab_get_text
        for token in range(FIRST_COMPARED, min(self.n_vocab, model.n_vocab)):
            if (own := text(self.vocab, token)) != (other := text(model.vocab, token)):
                differing = f"token {token} is {own!r}, not {other!r}"
                raise ModelError(f"draft {self.path} has another vocabulary than the model ({differing}): take another")
