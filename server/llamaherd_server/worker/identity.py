"""A fingerprint of everything that affects a model's results; cached prompts with a different one are ignored."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from llamaherd_server.gguf import part_paths
from llamaherd_server.wire.protocol import WorkerConfig
from llamaherd_server.worker.fit import Fit

# A model file has gigabytes, so only its size, its first bytes, and evenly spaced pieces are hashed.
_HEAD_BYTES, _PIECE_BYTES, _PIECES = 1 << 20, 1 << 14, 64


def identity(lib: Any, config: WorkerConfig, fit: Fit) -> str:
    """Hash the model, LoRAs, llama.cpp's libraries, the placement on devices, and the processor's features."""
    digest = hashlib.blake2b(digest_size=16)
    libraries = Path(lib._lib._name).resolve().parent
    files = [*part_paths(Path(config.path)), *(Path(one.path) for one in config.lora)]
    for path in [*files, *sorted(one for one in libraries.glob("lib*") if one.is_file() and not one.is_symlink())]:
        _add(digest, path)
    placement, overrides = fit
    on = (placement.gpu_layers, placement.cpu_moe_layers, placement.devices, *overrides)
    rest = (*on, [one.scale for one in config.lora], lib.llama_print_system_info())
    digest.update(repr(rest).encode())
    return digest.hexdigest()


def _add(digest: Any, path: Path) -> None:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8, "big") + file.read(_HEAD_BYTES))
        for number in range(_PIECES):
            file.seek(size * number // _PIECES)
            digest.update(file.read(_PIECE_BYTES))
