"""Reads GGUF headers with strict limits, and computes the memory that a model needs with given settings.

Both the server and the playbooks use this code. The playbooks link to it from plugins/module_utils and run it on hosts
with an older Python and without the package.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The file is untrusted: every length is checked
against the remaining file before anything is allocated, long arrays (a vocabulary has 10^5 entries) are skipped, and
reading stops beyond the size of any real model's header, so a file cannot cause unlimited use of time or memory.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping, Sequence
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

TENSOR_COUNT = "GGUF.tensor_count"
PADDING = 256
# Every n-th layer attends to the whole context if the GGUF does not list them; values from llama.cpp's architectures.
SLIDING_PERIOD = {
    **dict.fromkeys(("gemma2", "gpt-oss"), 2),
    **dict.fromkeys(("afmoe", "cohere2", "cohere2moe", "exaone4", "exaone-moe", "llama4", "olmo2", "smallthinker"), 4),
    **{"gemma3n": 5, "gemma3": 6, "plamo3": 8},
}
# Every n-th layer attends if the GGUF does not list them; the layers in between are recurrent.
FULL_ATTENTION_INTERVAL = dict.fromkeys(("qwen3next", "qwen35", "qwen35moe"), 4)
# If no context length is given: its share of the memory left by weights, minimum cells per slot, minimum length.
CONTEXT_SHARE, MIN_SHARED_CTX, MIN_CTX = 0.7, 16384, 2048
# Maximum drafted tokens of all sequences in a step, unless a single sequence may have more.
MAX_DRAFTED = 64
# Maximum drafted tokens of a sequence with a recurrent state, which is kept once more for each of them; and the
# architectures whose state llama.cpp can roll back (llm_arch_supports_rs_rollback in 0.3.36).
MAX_ROLLBACK = 4
ROLLS_BACK = {"bailingmoe3", "deepseek4", "glm5-next", "kimi-k3", "lfm2", "lfm2moe"} | {
    *("nemotron_h", "nemotron_h_moe", "qwen35", "qwen35moe", "qwen4exp"),
}
# Bytes per element of a KV cache: block bytes / block length, from ggml's type traits.
KV_BYTES = {
    **{"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32},
    **{"q5_1": 24 / 32, "q5_0": 22 / 32, "q4_1": 20 / 32, "q4_0": 18 / 32},
}
# Defaults of the settings that callers may omit.
DEFAULTS = {"kv_cells": 0, "kv_unified": True, "flash_attention": "auto", "kv_type_k": "f16", "kv_type_v": "f16"}


class GgufError(ValueError):
    """The file is not a readable GGUF; the message says why and where."""


class _Reader:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file = file
        self.size = size

    def take(self, length: int, what: str) -> bytes:
        self._check_length(length, what)
        return self.file.read(length)

    def skip(self, length: int, what: str) -> None:
        self._check_length(length, what)
        self.file.seek(length, os.SEEK_CUR)

    def _check_length(self, length: int, what: str) -> None:
        end = self.file.tell() + length
        if end > self.size:
            raise GgufError(f"{what} needs {length} bytes at {end - length}, the file has {self.size}: truncated?")
        if end > MAX_HEADER:
            raise GgufError(f"{what} ends at byte {end}, but headers are limited to {MAX_HEADER} bytes")

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
    """Return the metadata of the GGUF at `path` as `read_keys` does. Raises GgufError, OSError."""
    with path.open("rb") as file:
        return read_keys(file, os.fstat(file.fileno()).st_size)


def read_keys(file: BinaryIO, size: int) -> dict[str, Value]:
    """Return the metadata of a GGUF of `size` bytes: scalars, strings, and arrays of at most MAX_LAYERS integers.

    The length of every array, including those left out, is under `<key>.length`, the number of tensors under
    TENSOR_COUNT. Raises GgufError, OSError.
    """
    reader = _Reader(file, size)
    if reader.take(4, "the magic") != b"GGUF":
        raise GgufError("it does not begin with GGUF: not a model file")
    version = reader.number("<I", "the version")
    if version not in (2, 3):
        raise GgufError(f"GGUF version {version} is not 2 or 3")
    header: dict[str, Value] = {TENSOR_COUNT: reader.length("the tensor count", 1 << 20)}
    for _number in range(reader.length("the number of keys", MAX_KEYS)):
        key = reader.text("a key", MAX_KEY_LENGTH)
        _read_value(reader, key, int(reader.number("<I", f"the type of {key}")), header)
    return header


def part_names(name: str) -> list[str]:
    """Return the names of all parts of a split model, derived from one part's as in llama.cpp; otherwise [name].

    Folders or a URL before the file's name are kept.
    """
    prefix, count = (found[1], int(found[2])) if (found := _PART.fullmatch(name)) else ("", 1)
    return [f"{prefix}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)] if count > 1 else [name]


def part_paths(path: Path) -> list[Path]:
    """Return all files of the model at `path`, which may be a link of any name to the first part.

    llama.cpp derives the names of the other parts from the first one, so it must be given that file and not the link.
    """
    for first in path, path.resolve():
        if len(names := part_names(first.name)) > 1:
            return [first.with_name(name) for name in names]
    return [path]


def check_parts(headers: Sequence[Mapping[str, Value]]) -> None:
    """Raise GgufError unless these are the headers of all parts of one model, in order."""
    for number, header in enumerate(headers):
        own, count = header.get("split.no", 0), header.get("split.count", 0) or 1
        if (own, count) != (number, len(headers)):
            raise GgufError(
                f"part {number + 1} of {len(headers)} has split.no {own} and split.count {count}; a split model needs "
                "the sha256 of all its parts in order, and its first part as source"
            )
    found = sum(int(str(header[TENSOR_COUNT])) for header in headers)
    for number, header in enumerate(headers):
        if len(headers) > 1 and (promised := header.get("split.tensors.count", found)) != found:
            raise GgufError(
                f"split.tensors.count of part {number + 1} is {promised}, all parts have {found}: not of one model"
            )


_PART = re.compile(r"(.*)-[0-9]{5}-of-([0-9]{5})\.gguf", re.DOTALL)


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
    """The properties of a model that the memory formula needs; all are counts, and lists have one entry per layer.

    `key_lengths` and `value_lengths`: widths of a head; a value length of 0 means that V is part of K (MLA). `state`:
    f32 numbers of state per sequence in each `recurrent` layer.
    """

    architecture: str
    n_ctx_train: int
    n_embd: int
    n_heads: int
    n_ff: int
    n_vocab: int
    kv_heads: list[int]
    key_lengths: list[int]
    value_lengths: list[int]
    window: int = 0
    slides: list[bool] = field(default_factory=list)  # whether the layer attends only to the last `window` tokens
    recurrent: list[bool] = field(default_factory=list)
    state: int = 0

    @property
    def n_layers(self) -> int:
        return len(self.kv_heads)


class _Keys:
    """Looks up values of a header by their names without the architecture; raises GgufError for absurd ones."""

    def __init__(self, header: dict[str, Value]) -> None:
        architecture = header.get("general.architecture")
        if not isinstance(architecture, str):
            raise GgufError("general.architecture is missing")
        self.architecture = architecture
        self._header = header

    def value(self, name: str) -> Value | None:
        return self._header.get(f"{self.architecture}.{name}")

    def count(self, name: str, default: int | None = None, least: int = 1) -> int:
        """Return a count, or its maximum over layers; raises GgufError if absurd, or missing without a default."""
        value = self.value(name)
        value = default if value is None else max(value) if isinstance(value, list) and value else value
        if not isinstance(value, int) or not least <= value < 1 << 31:
            raise GgufError(f"{self.architecture}.{name} is {'missing' if value is None else value}")
        return value

    def layers(self, name: str, default: int, n_layers: int) -> list[int]:
        """Return the counts of all layers."""
        value = self.value(name)
        each = value if isinstance(value, list) else [self.count(name, default, 0)] * n_layers
        if len(each) != n_layers or min(each) < 0:
            raise GgufError(f"{self.architecture}.{name} is {each[:9]} for {n_layers} layers")
        return each


def shape(header: dict[str, Value]) -> Shape:
    """Return the model's shape from its header; raises GgufError that names a missing or absurd key."""
    keys = _Keys(header)
    count = keys.count
    n_layers, n_embd = count("block_count"), count("embedding_length")
    if n_layers > MAX_LAYERS:
        raise GgufError(f"{keys.architecture}.block_count is {n_layers}, more than the {MAX_LAYERS} we accept")
    n_heads = count("attention.head_count", 0, 0)
    kv_heads = keys.layers("attention.head_count_kv", n_heads, n_layers)
    recurrent, state = _recurrent(keys, kv_heads), _state(keys, n_embd, n_heads)
    if keys.architecture != "falcon-h1":  # its layers are recurrent and attend
        kv_heads = [0 if recurs else heads for heads, recurs in zip(kv_heads, recurrent)]  # noqa: B905 (Python 3.9)
    own = n_layers - count("attention.shared_kv_layers", 0, 0)  # the last layers share the cells of others
    kv_heads[own:] = [0] * (n_layers - own)
    window = count("attention.sliding_window", 0, 0)
    slides = _slides(keys, n_layers) if window else [False] * n_layers
    width = n_embd // max(n_heads, 1)

    def widths(kind: str) -> list[int]:
        full = count(f"attention.{kind}_length", width)
        sliding = count(f"attention.{kind}_length_swa", full)
        return [sliding if slides else full for slides in slides]

    vocabulary = header.get("tokenizer.ggml.tokens.length", keys.value("vocab_size") or 0)
    return Shape(
        architecture=keys.architecture,
        n_ctx_train=count("context_length"),
        n_embd=n_embd,
        n_heads=n_heads,
        n_ff=count("feed_forward_length", 4 * n_embd, 0) or 4 * n_embd,
        n_vocab=max(0, vocabulary) if isinstance(vocabulary, int) else 0,
        kv_heads=kv_heads,
        key_lengths=widths("key"),
        value_lengths=[0] * n_layers if keys.value("attention.key_length_mla") else widths("value"),
        window=window,
        slides=slides,
        recurrent=recurrent,
        state=state,
    )


def _slides(keys: _Keys, n_layers: int) -> list[bool]:
    """Return which layers have a sliding window: by the GGUF's list, or all but every n-th; none by default."""
    pattern = keys.value("attention.sliding_window_pattern")
    if isinstance(pattern, list) and len(pattern) == n_layers:
        return [bool(one) for one in pattern]
    period = pattern if isinstance(pattern, int) and pattern > 0 else SLIDING_PERIOD.get(keys.architecture, 1)
    return [layer % period < period - 1 for layer in range(n_layers)]


def _recurrent(keys: _Keys, kv_heads: list[int]) -> list[bool]:
    """Return which layers have a recurrent state, following llama.cpp's architectures."""
    if not any(keys.value(name) for name in ("ssm.conv_kernel", "shortconv.l_cache", "kda.head_dim", "wkv.head_size")):
        return [False] * len(kv_heads)
    listed = keys.value("attention.recurrent_layers")
    if isinstance(listed, list) and len(listed) == len(kv_heads):
        return [bool(one) for one in listed]
    interval = keys.count("full_attention_interval", FULL_ATTENTION_INTERVAL.get(keys.architecture, 0), 0)
    if interval:
        return [(layer + 1) % interval != 0 for layer in range(len(kv_heads))]
    if keys.architecture == "falcon-h1":
        return [True] * len(kv_heads)
    feeds = keys.value("feed_forward_length")  # in Nemotron-H, feed-forward layers are separate
    ff = feeds if isinstance(feeds, list) and keys.architecture.startswith("nemotron") else [0] * len(kv_heads)
    return [not heads and not n_ff for heads, n_ff in zip(kv_heads, ff)]  # noqa: B905 (Python 3.9)


def _state(keys: _Keys, n_embd: int, n_heads: int) -> int:
    """Return the sum of llama.cpp's llama_hparams::n_embd_r and n_embd_s."""

    def number(name: str) -> int:
        return keys.count(name, 0, 0)

    if head := number("wkv.head_size"):
        return n_embd * (head + 2)
    if cached := number("shortconv.l_cache"):
        return n_embd * (cached - 1)
    convolved = max(number("ssm.conv_kernel") - 1, 0)
    if head := number("kda.head_dim"):
        return n_heads * head * (head + 3 * (convolved or 3))
    inner, state = number("ssm.inner_size"), number("ssm.state_size")
    return convolved * (inner + 2 * number("ssm.group_count") * state) + state * inner


def kv_bytes(model: Shape, settings: Mapping[str, Any]) -> float:
    """Return the sum over layers of n_kv_heads x (d_k x bytes_k + d_v x bytes_v) x cells, plus recurrent f32 states."""
    key_bytes, value_bytes = KV_BYTES[settings["kv_type_k"]], KV_BYTES[settings["kv_type_v"]]
    cells, parallel = kv_cells(settings), int(settings["parallel"])
    streams = 1 if settings["kv_unified"] else parallel
    sliding = min(cells, streams * _padded(model.window * parallel // streams + int(settings["ubatch"])))
    states = 1 + (rollback(settings) if model.architecture in ROLLS_BACK else 0)
    total = 4.0 * model.state * sum(model.recurrent) * parallel * states
    for layer, heads in enumerate(model.kv_heads):
        per_head = model.key_lengths[layer] * key_bytes + model.value_lengths[layer] * value_bytes
        total += per_head * heads * (sliding if model.slides[layer] else cells)
    return total


def kv_cells(settings: Mapping[str, Any]) -> int:
    """Return the number of cells in the KV cache, in tokens; llama.cpp pads contexts to PADDING."""
    if settings["kv_unified"]:
        return _padded(int(settings["kv_cells"]) or int(settings["parallel"]) * int(settings["ctx_per_slot"]))
    return int(settings["parallel"]) * _padded(int(settings["ctx_per_slot"]))


def _padded(tokens: int) -> int:
    return -(-tokens // PADDING) * PADDING


def compute_bytes(model: Shape, settings: Mapping[str, Any]) -> int:
    """Return the size of llama.cpp's compute buffer for one ubatch and its logits; within 5 % of 0c1e570 on CPU.

    It consists of activations, the attention mask over one stream's context (f16 with flash attention, otherwise f32),
    and without flash attention the scores of every head. An MTP head has a buffer of its own.
    """
    parallel, ubatch = int(settings["parallel"]), int(settings["ubatch"])
    context = kv_cells(settings) // (1 if settings["kv_unified"] else parallel)
    flash = settings["flash_attention"] != "off"
    per_token = 4 * (3 * model.n_ff + 4 * model.n_embd) + context * (2 if flash else 4 * (model.n_heads + 1))
    computed = ubatch * per_token + 4 * (parallel + drafted(settings)) * model.n_vocab
    if settings.get("speculative") == "mtp":  # the head's context, and the states that it reads
        computed += ubatch * per_token + 4 * parallel * model.n_vocab + 8 * int(settings["batch"]) * model.n_embd
    return computed


def drafted(settings: Mapping[str, Any]) -> int:
    """Return the maximum number of drafted tokens in a step, each of which needs a row of logits."""
    drafts = settings.get("speculative", "off") != "off"
    return max(int(settings["speculative_depth"]), MAX_DRAFTED) if drafts else 0


def rollback(settings: Mapping[str, Any]) -> int:
    """Return how many earlier states of a recurrent sequence are kept, if its architecture ROLLS_BACK."""
    return min(int(settings["speculative_depth"]), MAX_ROLLBACK) if drafted(settings) else 0


def with_context(model: Shape, settings: Mapping[str, Any], memory_bytes: float) -> dict[str, Any]:
    """Replace a `ctx_per_slot` of 0 by the training context, or by what fits into CONTEXT_SHARE of `memory_bytes`.

    A unified cache gets cells for one whole context, and at least MIN_SHARED_CTX per slot, or as many as fit.
    """
    if int(settings["ctx_per_slot"]):
        return dict(settings)
    parallel, trained, memory_bytes = int(settings["parallel"]), model.n_ctx_train, CONTEXT_SHARE * memory_bytes
    whole = {**settings, "ctx_per_slot": trained}
    if not settings["kv_unified"]:
        return {
            **whole,
            "ctx_per_slot": max(largest("ctx_per_slot", PADDING, model, whole, memory_bytes), _min_ctx(model)),
        }
    cells = int(settings["kv_cells"]) or parallel * min(trained, max(MIN_SHARED_CTX, -(-trained // parallel)))
    fits = largest("kv_cells", PADDING, model, {**whole, "kv_cells": cells}, memory_bytes)
    cells = max(fits, min(cells, _min_ctx(model)))
    ctx = min(trained, cells)
    return {**settings, "ctx_per_slot": ctx, "kv_cells": cells if cells < parallel * ctx else 0}


def _min_ctx(model: Shape) -> int:
    return min(model.n_ctx_train, MIN_CTX)


def largest(name: str, step: int, model: Shape, settings: Mapping[str, Any], memory_bytes: float) -> int:
    """Return the largest multiple of `step`, up to the setting's current value, that fits; 0 if none does."""
    fits, end = 0, settings[name] // step + 1
    while end - fits > 1:
        middle = (fits + end) // 2
        changed = {**settings, name: middle * step}
        if kv_bytes(model, changed) + compute_bytes(model, changed) <= memory_bytes:
            fits = middle
        else:
            end = middle
    return fits * step
