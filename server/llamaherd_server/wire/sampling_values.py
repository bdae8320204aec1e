"""Checks sampling fields for both engines, so that values that llama.cpp cannot handle never reach it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

# Lowest and highest value of each field; values outside are refused.
_FLOAT = (-1e6, 1e6)
_BOUNDS: dict[str, tuple[float, float]] = {
    "temperature": _FLOAT,
    "dynatemp_range": _FLOAT,
    "dynatemp_exponent": _FLOAT,
    "top_k": (-(2**31), 2**31 - 1),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "typical_p": (0, 1),
    "top_n_sigma": _FLOAT,
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 1),
    "repeat_penalty": (1e-3, 1e3),
    "presence_penalty": (-1e3, 1e3),
    "frequency_penalty": (-1e3, 1e3),
    "dry_multiplier": (0, 1e6),
    "dry_base": (1e-3, 1e6),
    "dry_allowed_length": (0, 2**31 - 1),
    "mirostat": (0, 2),
    "mirostat_tau": (1e-3, 1e6),
    "mirostat_eta": (1e-6, 1e6),
    "min_keep": (0, 2**31 - 1),
    **dict.fromkeys(("n_probs", "logprobs"), (0, 100)),  # llama-server keeps the values of all tokens until the end
}
_ABOVE_0 = ("repeat_penalty", "dry_base", "mirostat_tau", "mirostat_eta")
_LAST_N = ("repeat_last_n", "dry_penalty_last_n")
MIN_TEMPERATURE = 1e-3  # below it the most likely token has all the probability, and floats may overflow
MAX_BIAS = 1e4  # larger values have the same effect: no logit is near it
MAX_LAST_N = 2**20
MAX_SAMPLERS = 32  # in a chain, because each may process the whole vocabulary
MAX_BREAKERS, BREAKER_BYTES = 32, 40  # llama.cpp truncates longer ones


class BadValue(ValueError):
    """An invalid value; `field` is the name of its field."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def checked(fields: Mapping[str, Any], *, n_vocab: int, context: int) -> dict[str, Any]:
    """Return the fields with values that llama.cpp can handle in a model of `n_vocab` tokens; raises BadValue.

    Windows of last tokens are limited to `context`, the longest possible sequence. Unknown fields stay unchanged, and
    so do values of a wrong type, which llama.cpp refuses itself.
    """
    result = dict(fields)
    for name, (low, high) in _BOUNDS.items():
        if _is_number(value := fields.get(name)) and not low <= value <= high:
            wanted = "a number above 0" if name in _ABOVE_0 and value <= 0 else f"between {low:g} and {high:g}"
            raise BadValue(name, f"{name} {value} must be {wanted}")
    if _is_number(value := fields.get("temperature")) and 0 < value < MIN_TEMPERATURE:
        result["temperature"] = 0.0
    for name in _LAST_N:
        if _is_number(value := fields.get(name)):
            most = min(context, MAX_LAST_N)
            result[name] = most if not 0 <= value <= most else int(value)
    if isinstance(bias := fields.get("logit_bias"), dict) and all(isinstance(token, int) for token in bias):
        result["logit_bias"] = {token: _bias(token, value, n_vocab) for token, value in bias.items()}
    samplers = fields.get("samplers")
    if isinstance(samplers, list | str) and len(samplers) > MAX_SAMPLERS:
        raise BadValue("samplers", f"samplers has {len(samplers)} entries: at most {MAX_SAMPLERS} are supported")
    breakers = fields.get("dry_sequence_breakers")
    if isinstance(breakers, list) and fields.get("dry_multiplier") and all(isinstance(one, str) for one in breakers):
        result["dry_sequence_breakers"] = _breakers(breakers)
    return result


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _bias(token: int, value: float, n_vocab: int) -> float:
    if not 0 <= token < n_vocab:
        raise BadValue("logit_bias", f"logit_bias: token {token} is not in the vocabulary of {n_vocab} tokens")
    if math.isnan(value):
        raise BadValue("logit_bias", f"logit_bias: the bias of token {token} is not a number")
    return value if value == -math.inf else max(-MAX_BIAS, min(MAX_BIAS, value))


def _breakers(breakers: list[str]) -> list[str]:
    """Truncate as llama.cpp does, without duplicates; raises BadValue if many, as each costs a pass over all tokens."""
    cut = dict.fromkeys(one.encode(errors="replace")[:BREAKER_BYTES].decode(errors="ignore") for one in breakers if one)
    if len(cut) > MAX_BREAKERS:
        message = f"dry_sequence_breakers has {len(cut)} texts: at most {MAX_BREAKERS} are supported"
        raise BadValue("dry_sequence_breakers", message)
    return list(cut)
