"""Reading a GGUF header with strict bounds, and the memory that a model needs with given settings.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The file is untrusted: every length is checked
against what is left of it before anything is allocated, arrays (a vocabulary has 10^5 entries) are skipped, and all of
it ends where no header of a real model is that long, so that neither time nor memory is the file's to choose.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Union

MAX_HEADER = 1 << 26
MAX_KEYS = 4096
MAX_KEY_LENGTH = 1 << 16
MAX_STRING = 1 << 26
MAX_LAYERS = 4096
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
Value = Union[str, int, float, bool, list[int]]  # noqa: UP007 (a host may run this with Python 3.9)

PADDING = 256
# Every n-th layer sees all of the context, where the GGUF has no list of its own: as llama.cpp knows its architectures.
SLIDING_PERIOD = {
    **dict.fromkeys(("gemma2", "gpt-oss"), 2),
    **dict.fromkeys(("afmoe", "cohere2", "cohere2moe", "exaone4", "exaone-moe", "llama4", "olmo2", "smallthinker"), 4),
    **{"gemma3n": 5, "gemma3": 6, "plamo3": 8},
}
# Bytes per element of a KV cache: block bytes / block length, from ggml's type traits.
KV_BYTES = {
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
}


class GgufError(ValueError):
    """The file is not a GGUF that we can read; the message says where it goes wrong."""


class _Reader:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file = file
        self.size = size

    def take(self, length: int, what: str) -> bytes:
        self._see_room(length, what)
        return self.file.read(length)

    def skip(self, length: int, what: str) -> None:
        self._see_room(length, what)
        self.file.seek(length, os.SEEK_CUR)

    def _see_room(self, length: int, what: str) -> None:
        end = self.file.tell() + length
        if end > self.size:
            raise GgufError(f"{what} needs {length} bytes at {end - length}, the file has {self.size}: truncated?")
        if end > MAX_HEADER:
            raise GgufError(f"{what} ends at byte {end}, a header has at most the {MAX_HEADER} we accept")

    def number(self, form: str, what: str) -> int | float | bool:
        value: int | float | bool = struct.unpack(form, self.take(struct.calcsize(form), what))[0]
        return value

    def length(self, what: str, limit: int) -> int:
        value = int(self.number("<Q", what))
        if value > limit:
            raise GgufError(f"{what} is {value}, more than the {limit} we accept")
        return value

    def text(self, what: str, limit: int) -> str:
        return self.take(self.length(f"the length of {what}", limit), what).decode("utf-8", "replace")


def read_header(path: Path) -> dict[str, Value]:
    """The metadata of the GGUF at `path`: scalars, strings, and arrays of at most MAX_LAYERS integers.

    Longer arrays and arrays of strings appear by their length under `<key>.length`. Raises GgufError, OSError.
    """
    with path.open("rb") as file:
        reader = _Reader(file, os.fstat(file.fileno()).st_size)
        if reader.take(4, "the magic") != b"GGUF":
            raise GgufError("it does not begin with GGUF: not a model file")
        version = reader.number("<I", "the version")
        if version not in (2, 3):
            raise GgufError(f"GGUF version {version} is not 2 or 3")
        reader.length("the tensor count", 1 << 20)
        header: dict[str, Value] = {}
        for _number in range(reader.length("the number of keys", MAX_KEYS)):
            key = reader.text("a key", MAX_KEY_LENGTH)
            _read_value(reader, key, int(reader.number("<I", f"the type of {key}")), header)
        return header


def _read_value(reader: _Reader, key: str, kind: int, header: dict[str, Value]) -> None:
    if kind in _SCALARS:
        header[key] = reader.number(_SCALARS[kind], key)
    elif kind == _STRING:
        header[key] = reader.text(key, MAX_STRING)
    elif kind == _ARRAY:
        element = int(reader.number("<I", f"the element type of {key}"))
        count = reader.length(f"the length of {key}", reader.size)
        header[f"{key}.length"] = count
        if element == _STRING:
            for _number in range(count):
                reader.skip(reader.length(f"a length in {key}", MAX_STRING), key)
        elif element in _SCALARS:
            size = struct.calcsize(_SCALARS[element])
            if element not in (6, 12) and count <= MAX_LAYERS:
                raw = reader.take(count * size, key)
                header[key] = [int(item[0]) for item in struct.iter_unpack(_SCALARS[element], raw)]
            else:
                reader.skip(count * size, key)
        else:
            raise GgufError(f"{key} is an array of unknown type {element}")
    else:
        raise GgufError(f"{key} has unknown type {kind}")


@dataclass(frozen=True)
class Shape:
    """What the memory formula needs of a model; all counts, `kv_heads` one per layer."""

    architecture: str
    n_ctx_train: int
    n_embd: int
    n_heads: int
    n_ff: int
    n_vocab: int
    kv_heads: list[int]
    key_length: int
    value_length: int
    window: int = 0
    slides: list[bool] = field(default_factory=list)  # of each layer, whether it sees no further than `window`

    @property
    def n_layers(self) -> int:
        return len(self.kv_heads)


def shape(header: dict[str, Value]) -> Shape:
    """Take the model's shape out of `header`; raises GgufError naming the key that is missing or absurd."""
    architecture = header.get("general.architecture")
    if not isinstance(architecture, str):
        raise GgufError("general.architecture is missing")

    def count(name: str, default: int | None = None) -> int:
        value = header.get(f"{architecture}.{name}", default)
        value = max(value) if isinstance(value, list) and value else value
        if not isinstance(value, int) or not 0 < value < 1 << 31:
            raise GgufError(f"{architecture}.{name} is {'missing' if value is None else value}")
        return value

    n_layers, n_heads, n_embd = count("block_count"), count("attention.head_count"), count("embedding_length")
    if n_layers > MAX_LAYERS:
        raise GgufError(f"{architecture}.block_count is {n_layers}, more than the {MAX_LAYERS} we accept")
    per_layer = header.get(f"{architecture}.attention.head_count_kv", n_heads)
    kv_heads = per_layer if isinstance(per_layer, list) else [count("attention.head_count_kv", n_heads)] * n_layers
    if len(kv_heads) != n_layers or min(kv_heads) < 0:
        raise GgufError(f"{architecture}.attention.head_count_kv is {kv_heads[:9]} for {n_layers} layers")
    vocabulary = header.get("tokenizer.ggml.tokens.length", header.get(f"{architecture}.vocab_size", 0))
    return Shape(
        architecture=architecture,
        n_ctx_train=count("context_length"),
        n_embd=n_embd,
        n_heads=n_heads,
        n_ff=count("feed_forward_length", 4 * n_embd),
        n_vocab=max(0, vocabulary) if isinstance(vocabulary, int) else 0,
        kv_heads=kv_heads,
        key_length=count("attention.key_length", n_embd // n_heads),
        value_length=count("attention.value_length", n_embd // n_heads),
        window=count("attention.sliding_window") if header.get(f"{architecture}.attention.sliding_window") else 0,
        slides=_slides(header.get(f"{architecture}.attention.sliding_window_pattern"), architecture, n_layers),
    )


def _slides(pattern: Value | None, architecture: str, n_layers: int) -> list[bool]:
    """By the GGUF's own list, or every n-th layer sees all; none slides where neither is known."""
    if isinstance(pattern, list) and len(pattern) == n_layers:
        return [bool(one) for one in pattern]
    period = pattern if isinstance(pattern, int) and pattern > 0 else SLIDING_PERIOD.get(architecture, 1)
    return [layer % period < period - 1 for layer in range(n_layers)]


def kv_bytes(model: Shape, settings: Mapping[str, Any]) -> float:
    """Sum over layers of n_kv_heads x (d_k x bytes_k + d_v x bytes_v) x cells."""
    per_head = model.key_length * KV_BYTES[settings["kv_type_k"]] + model.value_length * KV_BYTES[settings["kv_type_v"]]
    cells, parallel = kv_cells(settings), int(settings["parallel"])
    streams = 1 if settings["kv_unified"] else parallel
    least = streams * _padded(model.window * parallel // streams + int(settings["ubatch"]))
    sliding = min(cells, least) if model.window else cells
    each = [sliding if slides else cells for slides in model.slides or [False] * model.n_layers]
    return per_head * sum(heads * cells for heads, cells in zip(model.kv_heads, each, strict=True))


def kv_cells(settings: Mapping[str, Any]) -> int:
    """All cells of the KV cache, in tokens; llama.cpp pads a context to PADDING."""
    if settings["kv_unified"]:
        return _padded(int(settings["kv_cells"]) or int(settings["parallel"]) * int(settings["ctx_per_slot"]))
    return int(settings["parallel"]) * _padded(int(settings["ctx_per_slot"]))


def _padded(tokens: int) -> int:
    return -(-tokens // PADDING) * PADDING


def compute_bytes(model: Shape, settings: Mapping[str, Any]) -> int:
    """llama.cpp's compute buffer for one ubatch, and its logits; within 5 % of llama.cpp 0c1e570, CPU.

    Activations, the attention mask over one stream's context (f16 with flash attention, else f32), and without flash
    attention the scores of every head.
    """
    parallel, ubatch = int(settings["parallel"]), int(settings["ubatch"])
    context = kv_cells(settings) // (1 if settings["kv_unified"] else parallel)
    flash = settings["flash_attention"] != "off"
    per_token = 4 * (3 * model.n_ff + 4 * model.n_embd) + context * (2 if flash else 4 * (model.n_heads + 1))
    return ubatch * per_token + 4 * parallel * model.n_vocab
