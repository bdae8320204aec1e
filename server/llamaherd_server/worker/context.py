"""A llama_context over loaded weights: its batches, its KV cache by sequence, and whether it fits into memory."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import msgspec

from llamaherd_server.protocol import EngineSettings, TokenLogprob
from llamaherd_server.worker.model import Model, ModelError
from llamaherd_server.worker.sequence import Sequence

# Bytes per element (measurement: block size over block length), and ggml's type numbers.
KV_TYPES = {
    "f32": (4.0, 0),
    "f16": (2.0, 1),
    "q4_0": (0.5625, 2),
    "q4_1": (0.625, 3),
    "q5_0": (0.6875, 6),
    "q5_1": (0.75, 7),
    "q8_0": (1.0625, 8),
    "bf16": (2.0, 30),
}
FLASH = {"auto": -1, "off": 0, "on": 1}
SLOT_PADDING = 256  # llama.cpp pads each sequence's context to this
MIB = 2**20


class DoesNotFit(Exception):
    """A context with these settings would not fit; the message has the numbers."""


class Context:
    """Implements scheduler.Backend. Raises DoesNotFit when the memory does not allow these settings."""

    def __init__(self, model: Model, settings: EngineSettings) -> None:
        self._model = model
        self._lib = lib = model.lib
        self.settings = settings = resolve_threads(settings)
        check_fits(model, settings)
        params = lib.llama_context_default_params()
        params.n_ctx = settings.parallel * padded(settings.ctx_per_slot)
        params.n_batch = settings.batch
        params.n_ubatch = settings.ubatch
        params.n_seq_max = params.n_outputs_max = settings.parallel
        params.n_threads = settings.threads
        params.n_threads_batch = settings.threads_batch
        params.flash_attn_type = FLASH[settings.flash_attention]
        params.type_k = KV_TYPES[settings.kv_type_k][1]
        params.type_v = KV_TYPES[settings.kv_type_v][1]
        params.kv_unified = settings.kv_unified
        params.no_perf = True
        self.handle = lib.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise DoesNotFit("llama.cpp cannot build a context from these settings; its log says why")
        self._memory = lib.llama_get_memory(self.handle)
        self.size = settings.parallel * settings.ctx_per_slot
        self._batch = lib.llama_batch_init(settings.batch, 0, 1)

    def close(self) -> None:
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self.handle)

    def decode(self, shares: list[tuple[Sequence, int]]) -> int:
        """llama_decode: 0 done; 1 no room in the KV cache, nothing changed; anything else is fatal."""
        batch = self._batch
        token, position, count, slot, output = batch.token, batch.pos, batch.n_seq_id, batch.seq_id, batch.logits
        row = 0
        for sequence, share in shares:
            start = sequence.computed
            for at in range(start, start + share):
                token[row] = sequence.tokens[at]
                position[row] = at
                count[row] = 1
                slot[row][0] = sequence.slot
                output[row] = False
                row += 1
            output[row - 1] = start + share == len(sequence.tokens)
        batch.n_tokens = row
        return int(self._lib.llama_decode(self.handle, batch))

    def warm_up(self) -> None:
        """Compute one token, so that ready means that the model answers; raises ModelError."""
        batch = self._batch
        batch.n_tokens = batch.n_seq_id[0] = 1
        batch.token[0] = batch.pos[0] = batch.seq_id[0][0] = 0
        batch.logits[0] = True
        if self._lib.llama_decode(self.handle, batch) != 0:
            raise ModelError("the model loads but cannot compute a token")
        self.forget(0)

    def sample(self, chain: Any, row: int) -> int:
        """The next token from batch row `row`; the chain accepts it."""
        return int(self._lib.llama_sampler_sample(chain, self.handle, row))

    def logprob(self, row: int, token: int, top: int) -> TokenLogprob:
        from llamaherd_server.worker.logprobs import token_logprob  # noqa: PLC0415 (numpy, 25 MiB that few need)

        logits = self._lib.llama_get_logits_ith(self.handle, row)
        return token_logprob(logits, self._model.n_vocab, token, top, self._model.piece)

    def piece(self, token: int) -> bytes:
        return self._model.piece(token)

    def is_eog(self, token: int) -> bool:
        return self._model.is_eog(token)

    def forget(self, slot: int, start: int = 0) -> None:
        """Drop a slot's cells from position `start` on."""
        self._lib.llama_memory_seq_rm(self._memory, slot, start, -1)

    def share(self, source: int, target: int, length: int) -> None:
        """Give the empty slot `target` the first `length` positions of `source`.

        With split KV llama.cpp copies whole sequences only, so what is too much goes again.
        """
        if self.settings.kv_unified:
            self._lib.llama_memory_seq_cp(self._memory, source, target, 0, length)
        else:
            self._lib.llama_memory_seq_cp(self._memory, source, target, -1, -1)
            self.forget(target, length)


def padded(tokens: int) -> int:
    return math.ceil(tokens / SLOT_PADDING) * SLOT_PADDING


def resolve_threads(settings: EngineSettings) -> EngineSettings:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = settings.threads or cores
    return msgspec.structs.replace(settings, threads=threads, threads_batch=settings.threads_batch or threads)


def check_fits(model: Model, settings: EngineSettings) -> None:
    """KV bytes a token: layers x KV heads x (key and value width x their bytes). Raises DoesNotFit."""
    per_token = model.kv_width * (KV_TYPES[settings.kv_type_k][0] + KV_TYPES[settings.kv_type_v][0])
    buffers = settings.ubatch * model.n_vocab * 4
    needed = per_token * settings.parallel * padded(settings.ctx_per_slot) + buffers
    available = available_bytes()
    if available is None or needed <= available:
        return
    fits = max(0, int((available - buffers) / per_token / settings.parallel)) // SLOT_PADDING * SLOT_PADDING
    raise DoesNotFit(
        f"parallel {settings.parallel} x ctx_per_slot {settings.ctx_per_slot} needs {needed / MIB:.0f} MiB for its KV "
        f"cache, {available / MIB:.0f} MiB are available: at parallel {settings.parallel}, ctx_per_slot {fits} fits"
    )


def available_bytes() -> float | None:
    """Memory that this process may still take; None where the system does not tell (macOS)."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024.0
    return None
