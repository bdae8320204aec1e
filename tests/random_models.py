"""Models of architectures that differ in what they keep of a prompt, with SmolLM2's tokenizer and random weights.

For speed, memory and state, never for what is said: `python -m tests.random_models hybrid` prints a GGUF's path.
Each reads 8,192 tokens and answers with words, and never ends by itself, so that an answer is as long as asked for and,
sent back as history, is the same tokens again. Attention is sharp: an answer changes when one cell of its prompt does.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import gguf
import numpy as np

Kind = Literal["dense", "hybrid", "sliding_window", "mixture"]
CACHE = Path.home() / ".cache/llamaherd/random_models"
ARCHITECTURES: dict[Kind, str] = {
    **{"dense": "llama", "hybrid": "lfm2", "sliding_window": "gemma3"},
    "mixture": "llama",  # Mixtral's: every layer is one of experts
}
CONTEXT, HEAD, KV_HEADS = 8192, 64, 2
WINDOW, FULL_EVERY = 512, 6  # Gemma 3's: every sixth layer sees all
ATTENTION_EVERY, CONVOLVED = 3, 3  # LFM2's: the layers between convolve a token with the two before
EXPERTS, EXPERTS_USED = 4, 2
SPOKEN = re.compile("Ġ[a-z]{3,8}")
SPOKEN_COUNT = 256


@dataclass(frozen=True)
class RandomModel:
    """`vocab`: tokens beyond the tokenizer's are unused ones, for what a large vocabulary costs."""

    kind: Kind
    layers: int = 12
    width: int = 256  # 64, or a multiple of 128
    vocab: int = 0

    def path(self) -> Path:
        """Its GGUF, written on the first call; LLAMAHERD_TEST_MODEL names the GGUF whose tokenizer it gets."""
        return cached(self.kind, f"{self} {Path(__file__).read_text()}", partial(_write, self))


def cached(kind: str, content: str, write: Callable[[Path, Path], None]) -> Path:
    """The GGUF that `write(source, target)` makes with the source's tokenizer; `content`: what else decides of it."""
    source = Path(os.environ["LLAMAHERD_TEST_MODEL"])
    described = f"{content} {source.name} {source.stat().st_size}"
    target = CACHE / f"{kind}-{hashlib.sha256(described.encode()).hexdigest()[:12]}.gguf"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            written = Path(folder) / target.name
            write(source, written)
            written.replace(target)
    return target


def _write(model: RandomModel, source: Path, target: Path) -> None:
    _Writer(model, source, target).write()


class _Writer(gguf.GGUFWriter):
    def __init__(self, model: RandomModel, source: Path, target: Path, architecture: str | None = None) -> None:
        super().__init__(target, architecture or ARCHITECTURES[model.kind])
        self._model = model
        self._random = np.random.default_rng(1)
        self._tokens = self._copy_tokenizer(gguf.GGUFReader(source))

    def write(self) -> None:
        model, width = self._model, self._model.width
        self._add_shape()
        self._add("token_embd", len(self._tokens), width, scale=1 if model.kind == "sliding_window" else width**0.5)
        self._norm("token_embd_norm" if model.kind == "hybrid" else "output_norm", width)
        self._add_output()
        for layer in range(model.layers):
            self._add_layer(f"blk.{layer}.", kv_heads=self._kv_heads(layer))
        self.write_header_to_file()
        self.write_kv_data_to_file()
        self.write_tensors_to_file()
        self.close()

    def _copy_tokenizer(self, source: gguf.GGUFReader) -> list[str]:
        tokens: list[str] = []
        for name, field in source.fields.items():
            if not name.startswith("tokenizer."):
                continue
            value = field.contents()
            if name == "tokenizer.ggml.tokens":
                value = tokens = [*value, *(f"[UNUSED{n}]" for n in range(self._model.vocab - len(value)))]
            elif name == "tokenizer.ggml.token_type":
                value = [*value, *[gguf.TokenType.UNUSED] * (self._model.vocab - len(value))]
            if field.types[0] == gguf.GGUFValueType.ARRAY:
                self.add_array(name, value)
            else:
                self.add_key_value(name, value, field.types[0])
        return tokens

    def _kv_heads(self, layer: int) -> int:
        convolves = self._model.kind == "hybrid" and (layer + 1) % ATTENTION_EVERY
        return 0 if convolves else min(KV_HEADS, self._model.width // HEAD)

    def _add_shape(self) -> None:
        model = self._model
        self.add_name(f"random {model.kind}")
        self.add_vocab_size(len(self._tokens))
        self.add_context_length(CONTEXT)
        self.add_block_count(model.layers)
        self.add_embedding_length(model.width)
        self.add_feed_forward_length(self._ff)
        self.add_head_count(model.width // HEAD)
        self.add_head_count_kv([self._kv_heads(layer) for layer in range(model.layers)])
        self.add_key_length(HEAD)
        self.add_value_length(HEAD)
        self.add_rope_dimension_count(HEAD)
        self.add_rope_freq_base(1e5)
        self.add_layer_norm_rms_eps(1e-5)
        if model.kind == "hybrid":
            self.add_shortconv_l_cache(CONVOLVED)
        if model.kind == "mixture":
            self.add_expert_count(EXPERTS)
            self.add_expert_used_count(EXPERTS_USED)
        if model.kind == "sliding_window":
            self.add_sliding_window(WINDOW)
            self.add_sliding_window_pattern(FULL_EVERY)

    @property
    def _ff(self) -> int:
        return 3 * self._model.width

    def _add(self, name: str, *shape: int, scale: float = 1, dtype: type[np.floating] = np.float16) -> None:
        weights = self._random.standard_normal(shape, dtype=np.float32) * (scale / math.sqrt(shape[-1]))
        self.add_tensor(f"{name}.weight", weights.astype(dtype))

    def _norm(self, name: str, size: int, scale: float = 1) -> None:
        self.add_tensor(f"{name}.weight", np.full(size, scale, np.float32))

    def _add_output(self) -> None:
        spoken = [number for number, token in enumerate(self._tokens) if SPOKEN.fullmatch(token)][:SPOKEN_COUNT]
        weights = np.zeros((len(self._tokens), self._model.width), np.float16)
        weights[spoken] = 0.2 * self._random.standard_normal((len(spoken), self._model.width))
        self.add_tensor("output.weight", weights)

    def _add_layer(self, block: str, *, kv_heads: int) -> None:
        width, normed = self._model.width, self._model.kind in ("hybrid", "sliding_window")
        self._norm(f"{block}attn_norm", width)
        if kv_heads:
            for name, heads in ("q", width // HEAD), ("k", kv_heads), ("v", kv_heads):
                sharp = 2 if name != "v" else 1
                self._add(f"{block}attn_{name}", heads * HEAD, width, scale=1 if normed else sharp)
                if normed and name != "v":
                    self._norm(f"{block}attn_{name}_norm", HEAD, scale=sharp)
            self._add(f"{block}attn_output", width, width)
        else:
            self._add(f"{block}shortconv.in_proj", 3 * width, width)
            self._add(f"{block}shortconv.conv", width, CONVOLVED, dtype=np.float32)
            self._add(f"{block}shortconv.out_proj", width, width)
        self._norm(f"{block}ffn_norm", width)
        experts, suffix = ([EXPERTS], "_exps") if self._model.kind == "mixture" else ([], "")
        if experts:
            self._add(f"{block}ffn_gate_inp", EXPERTS, width)
        self._add(f"{block}ffn_gate{suffix}", *experts, self._ff, width)
        self._add(f"{block}ffn_up{suffix}", *experts, self._ff, width)
        self._add(f"{block}ffn_down{suffix}", *experts, width, self._ff)
        if self._model.kind == "sliding_window":
            self._norm(f"{block}post_attention_norm", width)
            self._norm(f"{block}post_ffw_norm", width)


if __name__ == "__main__":
    for kind in ARCHITECTURES:
        if kind in sys.argv[1:]:
            print(RandomModel(kind).path())
