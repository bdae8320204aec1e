"""gguf_info: reads the header of a GGUF model and computes the memory that it needs."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gguf_info
short_description: Reads the header of a GGUF model and computes the memory that it needs
version_added: 0.1.0
description:
  - Reads the header of a model on the host and computes the memory for weights, KV cache and compute buffer with
    the given settings.
  - Changes nothing.
options:
  path:
    description: The GGUF file on the host. For a split model, the first part, with the others in the same directory.
    type: path
    required: true
  memory_bytes:
    description: The memory that the model may use. Determines RV(largest_parallel) and RV(largest_ctx_per_slot).
    type: int
    required: true
  settings:
    description:
      - The engine's settings C(parallel), C(ctx_per_slot) and C(ubatch), and any others that differ from the server's
        defaults.
    type: dict
    required: true
  beside:
    description:
      - GGUF files that are loaded with the model, such as a projector or a draft model. A draft model has the same
        context as the model.
    type: list
    elements: path
    default: []
author: ["The llamaherd authors (!UNKNOWN)"]
"""

EXAMPLES = r"""
- name: Read the header of the model and compute its memory
  llamaherd.llamaherd.gguf_info:
    path: /var/lib/llamaherd/models/model.gguf
    memory_bytes: 8589934592
    settings:
      parallel: 4
      ctx_per_slot: 4096
      ubatch: 512
  register: model
"""

RETURN = r"""
exists:
  description: Whether the file, or every part of it, exists. The values after RV(missing) are returned only if it does.
  returned: always
  type: bool
missing:
  description: The paths that do not exist.
  returned: always
  type: list
  elements: str
architecture:
  description: The architecture of the model.
  returned: when the file exists
  type: str
  sample: llama
n_layers:
  description: The number of layers.
  returned: when the file exists
  type: int
n_ctx_train:
  description: The context that the model was trained with, in tokens.
  returned: when the file exists
  type: int
weights_bytes:
  description: The size of the weights, of all parts.
  returned: when the file exists
  type: int
kv_bytes:
  description: The size of the KV cache.
  returned: when the file exists
  type: int
compute_bytes:
  description: The size of the compute buffer.
  returned: when the file exists
  type: int
beside_bytes:
  description: The memory for those of O(beside) that exist.
  returned: when the file exists
  type: int
needed_bytes:
  description: The sum of weights, KV cache, compute buffer and RV(beside_bytes).
  returned: when the file exists
  type: int
ctx_per_slot:
  description: The given C(ctx_per_slot) or, where that is 0, what the server decides on with O(memory_bytes).
  returned: when the file exists
  type: int
largest_parallel:
  description:
    - The largest C(parallel) with which the model fits into O(memory_bytes), up to the given value. 0 if none
      fits.
  returned: when the file exists
  type: int
largest_ctx_per_slot:
  description:
    - The largest C(ctx_per_slot) with which the model fits into O(memory_bytes), up to the given value. 0 if none
      fits.
  returned: when the file exists
  type: int
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.parsing.convert_bool import boolean
from ansible_collections.llamaherd.llamaherd.plugins.module_utils.gguf import (
    DEFAULTS,
    PADDING,
    GgufError,
    check_parts,
    compute_bytes,
    kv_bytes,
    largest,
    part_paths,
    read_header,
    shape,
    with_context,
)

PROJECTOR = "clip"  # general.architecture of a projector, which has no context


def needs(path: Path, settings: Mapping[str, Any], memory_bytes: int, beside: Sequence[Path] = ()) -> dict[str, Any]:
    files = part_paths(path)
    headers = [read_header(file) for file in files]
    check_parts(headers)
    model = shape(headers[0])
    weights = _size(files)
    others = [part_paths(one) for one in beside]
    headers = [read_header(one[0]) for one in others]
    drafts = [shape(header) for header in headers if header.get("general.architecture") != PROJECTOR]
    settings = with_context(model, settings, memory_bytes - weights - sum(map(_size, others)))
    needed = {
        "weights_bytes": weights,
        "kv_bytes": int(kv_bytes(model, settings)),
        "compute_bytes": compute_bytes(model, settings),
        "beside_bytes": sum(map(_size, others))
        + sum(int(kv_bytes(one, settings)) + compute_bytes(one, settings) for one in drafts),
    }
    memory_bytes -= needed["beside_bytes"]
    return {
        "architecture": model.architecture,
        "n_layers": model.n_layers,
        "n_ctx_train": model.n_ctx_train,
        "ctx_per_slot": int(settings["ctx_per_slot"]),
        **needed,
        "needed_bytes": sum(needed.values()),
        "largest_parallel": largest("parallel", 1, model, settings, memory_bytes - weights),
        "largest_ctx_per_slot": largest("ctx_per_slot", PADDING, model, settings, memory_bytes - weights),
    }


def _size(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "memory_bytes": {"type": "int", "required": True},
            "settings": {"type": "dict", "required": True},
            "beside": {"type": "list", "elements": "path", "default": []},
        },
        supports_check_mode=True,
    )
    path = Path(module.params["path"])
    missing = [str(file) for file in part_paths(path) if not file.exists()]
    if missing:
        module.exit_json(changed=False, exists=False, missing=missing)
    settings = {**DEFAULTS, **module.params["settings"]}
    settings["kv_unified"] = boolean(settings["kv_unified"])
    beside = [one for one in map(Path, module.params["beside"]) if all(file.exists() for file in part_paths(one))]
    try:
        found = needs(path, settings, module.params["memory_bytes"], beside)
        module.exit_json(changed=False, exists=True, missing=[], **found)
    except (GgufError, OSError) as error:
        module.fail_json(msg=f"{path} is not a usable GGUF: {error}")


if __name__ == "__main__":
    main()
