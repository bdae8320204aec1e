"""Settings of an engine and the placement of its model, as set by operators and by the tuner."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct, field

EngineKind = Literal["embedded", "llama-server"]
KvType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
Speculative = Literal["off", "ngram", "auto", "draft", "mtp"]


def _within(low: int, high: int, description: str) -> Meta:
    """Bounds for the schema only; decoding does not enforce them, because the front end has validated the settings."""
    return Meta(description=description, extra_json_schema={"minimum": low, "maximum": high})


class EngineSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of a llama.cpp context; all of them can be changed without reloading the weights.

    The total context is `parallel * ctx_per_slot` tokens in either KV layout, unless `kv_cells` gives the sequences
    fewer to share (unified KV only); a sequence is then preempted whenever cells run short.

    `python -m scripts.engine_settings` copies the bounds and descriptions to the playbooks. Constraints between
    settings are in config/setting_rules.py.
    """

    # the bounds are llama_max_parallel_sequences() and the range of llama.cpp's 32-bit token positions
    parallel: Annotated[int, _within(1, 256, "Number of slots, which are sequences computed at once.")] = 4
    batch: Annotated[int, _within(1, 2**31 - 1, "Maximum number of tokens in one decode step.")] = 2048
    ubatch: Annotated[int, _within(1, 2**31 - 1, "Maximum number of tokens computed at once within a step.")] = 512
    ctx_per_slot: Annotated[
        int,
        _within(0, 2**31 - 1, "Context of one slot in tokens. 0 uses the training context as far as it fits."),
    ] = 0
    kv_unified: Annotated[bool, Meta(description="Whether all slots share one KV cache.")] = True
    kv_cells: Annotated[
        int,
        _within(0, 2**31 - 1, "Size of a unified KV cache in tokens. 0 means parallel times ctx_per_slot."),
    ] = 0
    kv_type_k: Annotated[KvType, Meta(description="Data type of K in the KV cache.")] = "f16"
    kv_type_v: Annotated[KvType, Meta(description="Data type of V in the KV cache.")] = "f16"
    flash_attention: Annotated[Literal["auto", "on", "off"], Meta(description="Flash attention mode.")] = "auto"
    threads: Annotated[int, _within(0, 512, "Number of threads for decoding. 0 chooses one for the host.")] = 0
    threads_batch: Annotated[int, _within(0, 512, "Number of threads for prompts. 0 chooses one for the host.")] = 0
    speculative: Annotated[
        Speculative,
        Meta(description="By repeats, a draft model or an MTP head."),
    ] = "off"
    speculative_depth: Annotated[int, _within(1, 256, "Most tokens drafted for a sequence in a step.")] = 32


class Placement(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where a model's weights are placed and how they are loaded; a change reloads them.

    Names and meanings are those of llama.cpp's flags.
    """

    gpu_layers: Annotated[
        int | Literal["auto"],
        _within(-1, 2**31 - 1, "Layers on the accelerator. -1 puts all there, auto as many as its free memory holds."),
    ] = -1
    cpu_moe_layers: Annotated[
        int,
        _within(0, 2**31 - 1, "Number of first layers whose experts stay on the CPU, for mixtures of experts."),
    ] = 0
    devices: Annotated[
        list[str],
        Meta(description="Devices to use, such as CUDA0, in order. Empty uses all."),
    ] = field(default_factory=list)
    split_mode: Annotated[
        Literal["none", "layer", "row", "tensor"],
        Meta(description="How to split the model across devices."),
    ] = "layer"
    tensor_split: Annotated[
        list[float],
        Meta(description="Proportions of the devices. Empty splits by their free memory."),
    ] = field(default_factory=list)
    main_gpu: Annotated[
        int,
        _within(0, 63, "Device for all (split_mode none) or for intermediate results and KV (row)."),
    ] = 0
    load_mode: Annotated[
        Literal["auto", "none", "mmap", "mlock", "mmap+mlock", "dio"],
        Meta(description="How to load the weights."),
    ] = "auto"
    numa: Annotated[
        Literal["off", "distribute", "isolate", "numactl"],
        Meta(description="NUMA strategy on hosts with several nodes."),
    ] = "off"


class Placed(Struct, kw_only=True):
    """Where llama.cpp placed a model: `gpu_layers` of its `layers`, including the output layer, are on accelerators.

    `partial_layers` of these have experts or some matrices in host memory.
    """

    gpu_layers: int
    layers: int
    partial_layers: int = 0
