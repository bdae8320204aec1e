"""The weights and the vocabulary: the part of the engine that a reconfiguration keeps."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from llamaherd_server.gguf import GgufError, Shape, read_header, shape
from llamaherd_server.wire.engine_settings import Placed
from llamaherd_server.wire.protocol import ModelInfo, Pooling, Sampling, WorkerConfig
from llamaherd_server.wire.sampling_values import checked
from llamaherd_server.worker.draft_model import DraftModel
from llamaherd_server.worker.fit import fitted
from llamaherd_server.worker.forkserver import Forkserver
from llamaherd_server.worker.lib import Log
from llamaherd_server.worker.vocabulary import Vocabulary
from llamaherd_server.worker.weights import ModelError, check_magic, load_weights

MEAN_POOLING, RANK_POOLING = 1, 4  # llama_pooling_type
POOLING_NAMES: dict[int, Pooling] = {1: "mean", 2: "cls", 3: "last", 4: "rank"}
# Metadata keys below general.sampling, by the field of Sampling.
SAMPLING_KEYS = {
    **{"temperature": "temp", "repeat_last_n": "penalty_last_n", "repeat_penalty": "penalty_repeat"},
    **{name: name for name in ("top_k", "top_p", "min_p", "xtc_probability", "xtc_threshold")},
    **{name: name for name in ("mirostat", "mirostat_tau", "mirostat_eta")},
}


class Model(Vocabulary):
    """A loaded GGUF. `progress` gets the fraction loaded so far, 0 to 1. Raises ModelError.

    Without `weights` it has all metadata and the vocabulary, but computes nothing and takes next to no memory.
    """

    def __init__(
        self,
        lib: Any,
        log: Log,
        config: WorkerConfig,
        progress: Callable[[float], None],
        *,
        weights: bool = True,
    ) -> None:
        path = config.path
        check_magic(path)
        self.draft = None
        if config.draft and weights:  # first: the model is fitted into the memory that this leaves
            self.draft = DraftModel(lib, log, config.draft, config.placement, progress)
        self.fit = fitted(lib, path, config.placement, config.settings)
        self.forkserver = Forkserver(path)
        self.log = log
        placement, overrides = self.fit
        self.mtp = config.settings.speculative == "mtp"  # whether its head for further tokens is loaded
        handle = load_weights(lib, log, path, placement, progress, weights=weights, mtp=self.mtp, overrides=overrides)
        super().__init__(lib, handle)
        if self.mtp and (heads := int(lib.llama_model_n_layer_nextn(handle))) != 1:
            raise ModelError(f"speculative mtp: {path} has {heads} MTP heads, not one: choose another kind of drafts")
        if self.draft:
            self.draft.check_vocabulary(self)
        # Neither can be cut back: a recurrent state, nor a sliding window (in tokens) whose old cells are overwritten.
        self.recurrent = bool(lib.llama_model_is_recurrent(self.handle) or lib.llama_model_is_hybrid(self.handle))
        self.window = int(lib.llama_model_n_swa(self.handle))
        self.n_ctx_train = int(lib.llama_model_n_ctx_train(self.handle))
        # Clients expect one vector per input, so a GGUF without a pooling type gets the mean over the tokens.
        self.pooling = self.number("pooling_type") or MEAN_POOLING
        self.ranks = self.pooling == RANK_POOLING
        self.n_pooled = int((lib.llama_model_n_cls_out if self.ranks else lib.llama_model_n_embd_out)(self.handle))
        self.attends_backwards = self.meta(f"{self.meta('general.architecture')}.attention.causal") != "false"
        self.shape = _shape(path)
        self.on_gpu = placement.gpu_layers != 0 and bool(lib.llama_supports_gpu_offload())
        self._template = Path(config.chat_template).read_text() if config.chat_template else None
        self._adapters = [(self._adapter(one.path), one.scale) for one in config.lora]

    def number(self, key: str) -> int | None:
        """Return an integer of the architecture's metadata; None if the GGUF lacks it or has one for each layer."""
        value = self.meta(f"{self.meta('general.architecture')}.{key}")
        return int(value) if value.isdecimal() else None

    def meta(self, key: str) -> str:
        """Return a metadata value as text; empty if the GGUF lacks it."""
        buffer = ctypes.create_string_buffer(256)
        self.lib.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer))
        return buffer.value.decode(errors="replace")

    def adapt(self, context: Any) -> None:
        """Apply the configured LoRAs to `context`. Raises ModelError."""
        count = len(self._adapters)
        handles = (self.lib.llama_adapter_lora_p_ctypes * count)(*(handle for handle, _ in self._adapters))
        scales = (ctypes.c_float * count)(*(scale for _, scale in self._adapters))
        if count and self.lib.llama_set_adapters_lora(context, handles, count, scales) != 0:
            raise ModelError(f"the LoRAs cannot be applied: {self.log.last_error or 'unknown reason'}")

    def _placed(self) -> Placed | None:
        if not self.log.offloaded:
            return None
        on, layers = self.log.offloaded
        partial = len(self.fit.overrides) or self.fit.placement.cpu_moe_layers
        return Placed(gpu_layers=on, layers=layers, partial_layers=min(on, partial))

    def _adapter(self, path: str) -> Any:
        check_magic(path)
        handle = self.lib.llama_adapter_lora_init(self.handle, path.encode())
        if not handle:
            raise ModelError(f"{path} is not a LoRA for this model: {self.log.last_error or 'unknown reason'}")
        return handle

    def info(self) -> ModelInfo:
        lib, handle = self.lib, self.handle
        description = ctypes.create_string_buffer(256)
        lib.llama_model_desc(handle, description, len(description))
        template = lib.llama_model_chat_template(handle, None)
        return ModelInfo(
            description=description.value.decode(errors="replace"),
            architecture=self.meta("general.architecture"),
            n_params=lib.llama_model_n_params(handle),
            size_bytes=lib.llama_model_size(handle),
            n_ctx_train=self.n_ctx_train,
            n_vocab=self.n_vocab,
            n_embd=lib.llama_model_n_embd(handle),
            add_bos=bool(lib.llama_vocab_get_add_bos(self.vocab)),
            bos_token=self._special(lib.llama_vocab_bos(self.vocab)),
            eos_token=self._special(lib.llama_vocab_eos(self.vocab)),
            chat_template=self._template or (template.decode(errors="replace") if template else None),
            placed=self._placed(),
            pooling=POOLING_NAMES[self.pooling],
            fim=self._fim(),
            sampling=self._sampling(),
            build=lib.llama_print_system_info().decode(errors="replace").strip(),
        )

    def _fim(self) -> tuple[str, str, str] | None:
        pre, suf, mid = (getattr(self.lib, f"llama_vocab_fim_{part}")(self.vocab) for part in ("pre", "suf", "mid"))
        if min(pre, suf, mid) < 0:
            return None
        return self._special(pre), self._special(suf), self._special(mid)

    def _sampling(self) -> dict[str, int | float]:
        """The GGUF's own sampling defaults, without those that llama.cpp cannot take."""
        defaults, found = Sampling(), dict[str, int | float]()
        for name, key in SAMPLING_KEYS.items():
            try:
                number = type(getattr(defaults, name))(float(self.meta(f"general.sampling.{key}")))
                found |= checked({name: number}, n_vocab=self.n_vocab, context=self.n_ctx_train)
            except (ValueError, OverflowError):
                continue
        return found

    def _special(self, token: int) -> str:
        return self.piece(token, special=True).decode(errors="replace") if token >= 0 else ""


def _shape(path: str) -> Shape | None:
    """The shape from the GGUF's header; None if this parser rejects it, which llama.cpp may not."""
    with suppress(GgufError):
        return shape(read_header(Path(path)))
    return None
