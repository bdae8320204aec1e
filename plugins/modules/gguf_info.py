"""gguf_info: reads a model's header on the host and says how much memory it needs with the settings given.

Returns exists, and for a model that is there: architecture, n_layers, n_ctx_train, weights_bytes, kv_bytes,
compute_bytes, needed_bytes, and largest_parallel and largest_ctx_per_slot: what fits into memory_bytes when only that
one setting is lowered.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llamaherd.llamaherd.plugins.module_utils.gguf import (
    KV_BYTES,
    PADDING,
    GgufError,
    Shape,
    compute_bytes,
    kv_bytes,
    read_header,
    shape,
)


def parts(model: Shape, weights: int, settings: Mapping[str, Any]) -> dict[str, int]:
    """Bytes by what they are for."""
    return {
        "weights_bytes": weights,
        "kv_bytes": int(kv_bytes(model, settings)),
        "compute_bytes": compute_bytes(model, settings),
    }


def needs(path: Path, settings: Mapping[str, Any], memory_bytes: int) -> dict[str, Any]:
    model = shape(read_header(path))
    weights = path.stat().st_size
    needed = parts(model, weights, settings)

    def largest(name: str, step: int) -> int:
        """The largest multiple of `step` up to the present value with which all of it fits; 0 if none does."""
        fits, end = 0, settings[name] // step + 1
        while end - fits > 1:
            middle = (fits + end) // 2
            if sum(parts(model, weights, {**settings, name: middle * step}).values()) <= memory_bytes:
                fits = middle
            else:
                end = middle
        return fits * step

    return {
        "architecture": model.architecture,
        "n_layers": model.n_layers,
        "n_ctx_train": model.n_ctx_train,
        **needed,
        "needed_bytes": sum(needed.values()),
        "largest_parallel": largest("parallel", 1),
        "largest_ctx_per_slot": largest("ctx_per_slot", PADDING),
    }


def main() -> None:
    kv_type = {"type": "str", "choices": sorted(KV_BYTES), "default": "f16"}
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "memory_bytes": {"type": "int", "required": True},
            "parallel": {"type": "int", "required": True},
            "ctx_per_slot": {"type": "int", "required": True},
            "ubatch": {"type": "int", "required": True},
            "kv_cells": {"type": "int", "default": 0},
            "kv_unified": {"type": "bool", "default": True},
            "flash_attention": {"type": "str", "choices": ["auto", "on", "off"], "default": "auto"},
            "kv_type_k": kv_type,
            "kv_type_v": kv_type,
        },
        supports_check_mode=True,
    )
    path = Path(module.params["path"])
    if not path.exists():
        module.exit_json(changed=False, exists=False)
    try:
        module.exit_json(changed=False, exists=True, **needs(path, module.params, module.params["memory_bytes"]))
    except (GgufError, OSError) as error:
        module.fail_json(msg=f"{path} is no usable GGUF: {error}")


if __name__ == "__main__":
    main()
