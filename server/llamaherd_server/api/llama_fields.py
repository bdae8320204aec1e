"""llama-server's fields for features that this server lacks. They are accepted if their value has no effect.

Sources: tools/server/server-schema.cpp and common/sampling.cpp of the pinned llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llamaherd_server.errors import unsupported

# For each field, whether a value turns its feature off.
_IS_OFF: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("dynatemp_range", "n_indent"), lambda value: value == 0),
    **dict.fromkeys(("top_n_sigma", "t_max_predict_ms"), lambda value: value <= 0),
    **dict.fromkeys(("adaptive_target", "reasoning_budget_tokens", "thinking_budget_tokens"), lambda value: value < 0),
    **dict.fromkeys(("lora", "image_data", "grammar_triggers", "preserved_tokens"), lambda value: value == []),
    **dict.fromkeys(
        ("grammar_lazy", "echo", "reasoning_control", "post_sampling_probs", "verbose"), lambda value: value is False
    ),
    **dict.fromkeys(("min_keep", "best_of", "tfs_z"), lambda value: value in (0, 1)),
    "parse_tool_calls": lambda value: value is True,
    # Any value: these have no effect of their own, or affect only where and how fast an answer is computed.
    **dict.fromkeys(
        ("dynatemp_exponent", "adaptive_decay", "n_keep", "n_discard", "n_cache_reuse", "t_max_prompt_ms"),
        lambda _: True,
    ),
    **dict.fromkeys(
        ("backend_sampling", "sse_ping_interval", "return_tokens", "response_fields", "timings_per_token"),
        lambda _: True,
    ),
}
# The samplers in the only supported order, each with its letter and the values that disable it.
_SAMPLERS: dict[str, tuple[str, dict[str, float]]] = {
    "penalties": ("e", {"repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}),
    "dry": ("d", {"dry_multiplier": 0.0}),
    "top_n_sigma": ("s", {}),
    "top_k": ("k", {"top_k": 0}),
    "typ_p": ("y", {"typical_p": 1.0}),
    "top_p": ("p", {"top_p": 1.0}),
    "min_p": ("m", {"min_p": 0.0}),
    "xtc": ("x", {"xtc_probability": 0.0}),
    "temperature": ("t", {"temperature": 1.0}),
}
SAMPLERS = [*_SAMPLERS]
_NAMES = {letter: name for name, (letter, _) in _SAMPLERS.items()} | {
    **{spelling: name for name in _SAMPLERS for spelling in (name, name.replace("_", "-"), name.replace("_", ""))},
    **{"nucleus": "top_p", "temp": "temperature", "typ": "typ_p"},
}


def without_off(body: dict[str, Any], known: frozenset[str] | set[str]) -> dict[str, Any]:
    """Return the body without fields whose value has no effect, except those in `known`. Raises `unsupported`."""
    result = {}
    for name, value in body.items():
        is_off = None if name in known or value is None else _IS_OFF.get(name)
        if is_off is None:
            result[name] = value
        elif not _holds(is_off, value):
            message = f"{name}: supported only by the engine llama-server, at /completion and /infill"
            raise unsupported(name, message)
    return result


def _holds(is_off: Callable[[Any], bool], value: Any) -> bool:
    try:
        return is_off(value)
    except TypeError:
        return False


def with_samplers(body: dict[str, Any]) -> dict[str, Any]:
    """Return the body with `samplers` (names or letters) converted to sampling fields. Raises `unsupported`."""
    given = body.get("samplers")
    if given is None:
        return body
    names = [_NAMES.get(str(one).lower()) for one in given] if isinstance(given, list | str) else [None]
    chosen = [name for name in names if name]
    if len(chosen) < len(names) or chosen != [name for name in SAMPLERS if name in chosen]:
        message = f"samplers: must be in the order {', '.join(SAMPLERS)}; others need the engine llama-server"
        raise unsupported("samplers", message)
    left_out = {} if body.get("mirostat") else {name: off for name, off in _SAMPLERS.items() if name not in chosen}
    values = {field: value for _, off in left_out.values() for field, value in off.items()}
    return {name: value for name, value in body.items() if name != "samplers"} | values


def renamed(body: Any, names: dict[str, str]) -> Any:
    """Return the body with fields renamed from keys to values of `names`. A field already present takes precedence."""
    if not isinstance(body, dict):
        return body
    moved = {names[name]: body[name] for name in names if body.get(name) is not None}
    return moved | {name: value for name, value in body.items() if name not in names and value is not None}
