"""Tiny models with random weights, written as GGUF: an encoder for embeddings, and one with a ranking head."""

from __future__ import annotations

import string
from pathlib import Path

import gguf
import numpy as np

WIDTH, HEADS, LAYERS, FEED_FORWARD = 64, 4, 2, 128
N_CTX = 64
SMOLLM2_WIDTH = 576  # SmolLM2-135M's embedding
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(mark + one for mark in ("▁", "") for one in string.ascii_lowercase)]


def write_lora(path: Path, weight: str, n_in: int, n_out: int) -> Path:
    """A LoRA of rank 1, with random weights, of a llama's tensor `weight`."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 1.0)
    random = np.random.default_rng(1)
    writer.add_tensor(f"{weight}.lora_a", random.normal(0, 1, (1, n_in)).astype(np.float32))
    writer.add_tensor(f"{weight}.lora_b", random.normal(0, 1, (n_out, 1)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_encoder(path: Path, pooling: gguf.PoolingType, **sampling: float) -> Path:
    """A BERT of a few thousand weights whose tokens are letters; `sampling`: its metadata of that kind."""
    writer = gguf.GGUFWriter(path, "bert")
    for name, value in sampling.items():
        writer.add_float32(f"general.sampling.{name}", value)
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(1e-5)
    writer.add_causal_attention(False)
    writer.add_pooling_type(pooling)
    writer.add_tokenizer_model("bert")
    writer.add_token_list(TOKENS)
    writer.add_token_type_count(2)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(3)
    writer.add_sep_token_id(3)
    writer.add_unk_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)
    random = np.random.default_rng(1)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, random.normal(0, 0.3, shape).astype(np.float32))

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(WIDTH, np.float32))

    add("token_embd.weight", len(TOKENS), WIDTH)
    add("token_types.weight", 2, WIDTH)
    add("position_embd.weight", N_CTX, WIDTH)
    norm("token_embd_norm")
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}.weight", WIDTH, WIDTH)
        add(f"blk.{layer}.ffn_up.weight", FEED_FORWARD, WIDTH)
        add(f"blk.{layer}.ffn_down.weight", WIDTH, FEED_FORWARD)
        norm(f"blk.{layer}.attn_output_norm")
        norm(f"blk.{layer}.layer_output_norm")
    if pooling == gguf.PoolingType.RANK:
        add("cls.weight", WIDTH, WIDTH)
        add("cls.output.weight", 1, WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
