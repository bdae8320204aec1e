"""The weights and the vocabulary: everything of the engine that a retune leaves alone."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llamaherd_server.protocol import ModelInfo


class ModelError(Exception):
    """The model cannot be loaded; the message is one line for the operator."""


class Model:
    """A loaded GGUF."""

    def __init__(self, lib: Any, path: str, gpu_layers: int, progress: Callable[[float], None]) -> None:
        with Path(path).open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise ModelError(f"{path} is no GGUF file: it begins with {magic!r}")
        self.lib = lib
        params = lib.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        shown = -1.0

        def report(done: float, _user_data: Any) -> bool:
            nonlocal shown
            if done - shown >= 0.05:
                shown = done
                progress(done)
            return True

        self._callback = lib.llama_progress_callback(report)
        params.progress_callback = self._callback
        self.handle = lib.llama_model_load_from_file(path.encode(), params)
        if not self.handle:
            raise ModelError(f"{path} cannot be loaded: it is damaged or of a kind that this llama.cpp does not know")
        self.vocab = lib.llama_model_get_vocab(self.handle)
        self.n_vocab = lib.llama_vocab_n_tokens(self.vocab)
        self.eog_tokens = [token for token in range(self.n_vocab) if lib.llama_vocab_is_eog(self.vocab, token)]
        self._eog = frozenset(self.eog_tokens)
        heads = lib.llama_model_n_head_kv(self.handle) / lib.llama_model_n_head(self.handle)
        # Elements that one token adds to the K cache, and to the V cache, over all layers.
        self.kv_width = lib.llama_model_n_layer(self.handle) * lib.llama_model_n_embd(self.handle) * heads

    def is_eog(self, token: int) -> bool:
        return token in self._eog

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode()
        room = len(data) + 16
        while True:
            tokens = (ctypes.c_int32 * room)()
            count = self.lib.llama_tokenize(self.vocab, data, len(data), tokens, room, add_special, parse_special)
            if count >= 0:
                return tokens[:count]
            room = -count

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of one token; empty for a control token unless `special`."""
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = self.lib.llama_token_to_piece(self.vocab, token, buffer, room, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            room = -count

    def detokenize(self, tokens: list[int]) -> str:
        return b"".join(self.piece(token, special=True) for token in tokens).decode(errors="replace")

    def info(self) -> ModelInfo:
        lib, handle = self.lib, self.handle
        buffer = ctypes.create_string_buffer(256)
        lib.llama_model_desc(handle, buffer, len(buffer))
        template = lib.llama_model_chat_template(handle, None)
        return ModelInfo(
            description=buffer.value.decode(errors="replace"),
            architecture=self._meta(b"general.architecture"),
            n_params=lib.llama_model_n_params(handle),
            size_bytes=lib.llama_model_size(handle),
            n_ctx_train=lib.llama_model_n_ctx_train(handle),
            n_vocab=self.n_vocab,
            n_embd=lib.llama_model_n_embd(handle),
            add_bos=bool(lib.llama_vocab_get_add_bos(self.vocab)),
            bos_token=self._special(lib.llama_vocab_bos(self.vocab)),
            eos_token=self._special(lib.llama_vocab_eos(self.vocab)),
            eot_token=self._special(lib.llama_vocab_eot(self.vocab)),
            chat_template=template.decode(errors="replace") if template else None,
            build=lib.llama_print_system_info().decode(errors="replace").strip(),
        )

    def _special(self, token: int) -> str:
        return self.piece(token, special=True).decode(errors="replace") if token >= 0 else ""

    def _meta(self, key: bytes) -> str:
        buffer = ctypes.create_string_buffer(256)
        self.lib.llama_model_meta_val_str(self.handle, key, buffer, len(buffer))
        return buffer.value.decode(errors="replace")
