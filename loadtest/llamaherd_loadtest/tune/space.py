"""The settings that may be tried: a grid around the current ones, without those that cannot work."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence

from msgspec import Struct

from llamaherd_loadtest.tune.settings import LLAMA_CPP_DEFAULTS, Settings, Value, key

Space = dict[str, list[Value]]


class Pruned(Struct, frozen=True):
    """Settings that are not launched, and why."""

    settings: Settings
    why: str


# Bytes per element: a ggml block's bytes over its 32 elements.
_ELEMENT_BYTES = {
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
}
_QUALITY = ("kv_type_k", "kv_type_v")
_VALUES: Space = {
    "parallel": [1, 2, 4, 8, 16],
    "batch": [512, 2048],
    "ubatch": [128, 512],
    "kv_unified": [True, False],
}
_KV_TYPES: list[Value] = ["f16", "q8_0", "q4_0"]
_THREADS = ("threads", "threads_batch")


def default_space(current: Settings, *, quality: bool = False) -> Space:
    """Return the default values to try. The server's thread counts are those the host has for it; half of them are
    enough if memory is the bottleneck or two threads share a core. `quality` adds KV types."""
    space: Space = {knob: values for knob, values in _VALUES.items() if knob in current}
    for knob in _THREADS:
        if isinstance(count := current.get(knob), int) and count > 1:
            space[knob] = [count // 2, count]
    return space | ({knob: _KV_TYPES for knob in _QUALITY if knob in current} if quality else {})


def parse_space(texts: Iterable[str], current: Settings, *, quality: bool = False) -> Space:
    """Parse `knob=value,value…`. Raises ValueError for a knob that the server does not have.

    Knobs that change answers, not only their speed, require `quality`.
    """
    space: Space = {}
    for text in texts:
        knob, separator, values = text.partition("=")
        if not separator or not values:
            raise ValueError(f"invalid space {text!r}: write for example parallel=1,2,4,8")
        if knob not in current:
            raise ValueError(f"unknown setting {knob!r}; available: {', '.join(current)}")
        if knob in _QUALITY and not quality:
            raise ValueError(
                f"{knob} changes what the model answers, not only how fast: give a limit such as kld=0.02, or --quality"
            )
        space[knob] = [_value(v) for v in values.split(",")]
    return space


def candidates(current: Settings, space: Space, *, mixed: bool = True) -> list[Settings]:
    """Return every point of the grid as full settings, without duplicates: the current first, then llama.cpp's default.

    Without `mixed`, keys and values have the same type: CUDA builds support no others in flash attention by default.
    """
    grid = (dict(zip(space, point, strict=True)) for point in itertools.product(*space.values()))
    default = {k: v for k, v in LLAMA_CPP_DEFAULTS.items() if k in current}
    points = (point for point in grid if mixed or len({point.get(knob) for knob in _QUALITY}) == 1)
    full = [{**current, **change} for change in ({}, default, *points)]
    return list({key(settings): settings for settings in full}.values())


def prune(settings: Sequence[Settings], need: int) -> tuple[list[Settings], list[Pruned]]:
    """Split settings into those to launch and those that cannot serve requests of `need` tokens of context."""
    reasons = [(s, _why_not(s, need)) for s in settings]
    return [s for s, why in reasons if not why], [Pruned(s, why) for s, why in reasons if why]


def knobs(all_settings: Sequence[Settings]) -> tuple[str, ...]:
    """Return the names of the settings that vary."""
    names = all_settings[0] if all_settings else ()
    return tuple(name for name in names if len({str(s.get(name)) for s in all_settings}) > 1)


def needs_as_much(settings: Settings, other: Settings) -> bool:
    """Return whether `settings` need at least as much memory as `other` on any model: KV cache and compute buffers.

    KV bytes are cells x the bytes of their keys and values, times a factor of the model; compute buffers grow with
    ubatch and with the cells that one sequence can see.
    """
    if any(settings.get(name) != other.get(name) for name in ("engine", "flash_attention")):
        return False
    mine, others = _memory(settings), _memory(other)
    return all(one >= two for one, two in zip(mine, others, strict=True))


def _memory(settings: Settings) -> tuple[float, ...]:
    cells = float(settings.get("kv_cells") or 0) or float(settings["parallel"]) * float(settings.get("ctx_per_slot", 1))
    keys, values = (cells * _ELEMENT_BYTES.get(str(settings.get(name)), 2.0) for name in _QUALITY)
    seen = cells if settings.get("kv_unified") else float(settings.get("ctx_per_slot", 1))
    return keys, values, seen, float(settings.get("ubatch", 1)), float(settings["parallel"])


def _why_not(settings: Settings, need: int) -> str:
    ctx, batch, ubatch = (settings.get(name) for name in ("ctx_per_slot", "batch", "ubatch"))
    if isinstance(ctx, int) and ctx < need:
        return f"a slot of {ctx} tokens is smaller than the workload's {need} at p99"
    if isinstance(batch, int) and isinstance(ubatch, int) and ubatch > batch:
        return f"ubatch {ubatch} is larger than batch {batch}"
    return ""


def _value(text: str) -> Value:
    words: dict[str, Value] = {"on": "on", "off": "off", "true": True, "false": False}
    if text.strip() in words:
        return words[text.strip()]
    try:
        number = json.loads(text)
    except json.JSONDecodeError:
        return text.strip()
    return number if isinstance(number, int | float) else text.strip()
