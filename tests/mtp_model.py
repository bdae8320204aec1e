"""A model with an MTP head whose guesses are known: each word has one successor, and the head knows it.

Nothing but the embedding and the output weights has an effect. The head `looks` either at the token, and then guesses
every further one, or at the model's state before it, from which it can only guess the first.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from tests.random_models import HEAD, SPOKEN, SPOKEN_COUNT, RandomModel, _Writer, cached

Looks = Literal["token", "state"]
WIDTH, FF, EXPERTS = 256, 32, 2


def mtp_model(looks: Looks) -> Path:
    """The path of its GGUF, written on the first call."""
    return cached("mtp", f"{looks} {Path(__file__).read_text()}", partial(_write, looks))


def _write(looks: Looks, source: Path, target: Path) -> None:
    _MtpWriter(looks, source, target).write()


class _MtpWriter(_Writer):
    def __init__(self, looks: Looks, source: Path, target: Path) -> None:
        super().__init__(RandomModel("dense", layers=2, width=WIDTH), source, target, "glm4moe")
        self._looks = looks

    def write(self) -> None:
        self._add_shape()
        self.add_nextn_predict_layers(1)
        self.add_expert_count(EXPERTS)
        self.add_expert_used_count(1)
        self.add_expert_shared_count(1)
        self.add_expert_feed_forward_length(FF)
        spoken = [number for number, token in enumerate(self._tokens) if SPOKEN.fullmatch(token)][:SPOKEN_COUNT]
        embedding = self._random.standard_normal((len(self._tokens), WIDTH)).astype(np.float16)
        self.add_tensor("token_embd.weight", embedding)
        self._norm("output_norm", WIDTH)
        self.add_tensor("output.weight", successors(embedding, spoken, 1))
        for layer in range(2):
            self._add_block(f"blk.{layer}.")
        halves = np.eye(WIDTH, dtype=np.float16), np.zeros((WIDTH, WIDTH), np.float16)
        self.add_tensor("blk.1.nextn.eh_proj.weight", np.hstack(halves if self._looks == "token" else halves[::-1]))
        self._norm("blk.1.nextn.enorm", WIDTH)
        self._norm("blk.1.nextn.hnorm", WIDTH)
        if self._looks == "state":
            self.add_tensor("blk.1.nextn.shared_head_head.weight", successors(embedding, spoken, 2))
        self.write_header_to_file()
        self.write_kv_data_to_file()
        self.write_tensors_to_file()
        self.close()

    def _add_block(self, block: str) -> None:
        self._norm(f"{block}attn_norm", WIDTH)
        self._norm(f"{block}post_attention_norm", WIDTH)
        for name, size in ("q", WIDTH), ("k", 2 * HEAD), ("v", 2 * HEAD):
            self._add(f"{block}attn_{name}", size, WIDTH)
        self._zeros(f"{block}attn_output", WIDTH, WIDTH)
        self._zeros(f"{block}ffn_gate_inp", EXPERTS, WIDTH, dtype=np.float32)
        self.add_tensor(f"{block}exp_probs_b.bias", np.zeros(EXPERTS, np.float32))
        for name, experts in ("exps", [EXPERTS]), ("shexp", []):
            self._zeros(f"{block}ffn_gate_{name}", *experts, FF, WIDTH)
            self._zeros(f"{block}ffn_up_{name}", *experts, FF, WIDTH)
            self._zeros(f"{block}ffn_down_{name}", *experts, WIDTH, FF)

    def _zeros(self, name: str, *shape: int, dtype: type[np.floating] = np.float16) -> None:
        self.add_tensor(f"{name}.weight", np.zeros(shape, dtype))


def successors(embedding: np.ndarray, spoken: list[int], steps: int) -> np.ndarray:
    """Output weights that choose the word `steps` after the one in the embedding, in the order of `spoken`."""
    weights = np.zeros_like(embedding)
    for place, token in enumerate(spoken):
        weights[token] = embedding[spoken[place - steps]]
    return weights
