"""Engine settings as the server's /admin/engine reads and writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping

Value = int | float | bool | str
Settings = Mapping[str, Value]

# llama.cpp's defaults for what may be searched; context, KV type and threads stay as the operator set them.
LLAMA_CPP_DEFAULTS: Settings = {
    "parallel": 4,
    "batch": 2048,
    "ubatch": 512,
    "kv_unified": True,
    "flash_attention": "auto",
}
_ALWAYS_NAMED = ("parallel", "batch", "ubatch")


def key(settings: Settings) -> str:
    """Return the same string for equal settings, whatever their order."""
    return json.dumps(dict(settings), sort_keys=True)


def label(settings: Settings, knobs: tuple[str, ...] = ()) -> str:
    """Format settings: "parallel 8, batch 2048, ubatch 512, kv_unified off", including the knobs that were searched."""
    names = [n for n in dict.fromkeys((*_ALWAYS_NAMED, *knobs)) if n in settings]
    return ", ".join(f"{name} {_word(settings[name])}" for name in names)


def difference(old: Settings, new: Settings) -> str:
    """Format what changes: "parallel 4 → 8, ubatch 512 → 256"."""
    names = [n for n in new if old.get(n) != new[n]]
    return ", ".join(f"{name} {_word(old.get(name, '?'))} → {_word(new[name])}" for name in names)


def _word(value: Value) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
