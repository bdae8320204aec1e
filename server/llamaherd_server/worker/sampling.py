"""Native sampler chains in llama-server's order: bias, penalties, DRY, top-k, typical, top-p, min-p, XTC, temperature.

grammar.py wraps a grammar around one.
"""

from __future__ import annotations

import ctypes
import math
import secrets
from collections import deque
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import msgspec

from llamaherd_server.wire import sampling_values
from llamaherd_server.wire.errors import RequestError
from llamaherd_server.wire.protocol import Sampling
from llamaherd_server.wire.sampling_values import BadValue
from llamaherd_server.worker.model import Model

if TYPE_CHECKING:
    from llamaherd_server.worker.logits import Candidates
    from llamaherd_server.worker.samplers import Draw

SEED_BITS = 32
MIROSTAT_M = 100  # tokens from which Mirostat estimates s, as in its paper
MIN_KEEP = 0
FORBIDDEN = -math.inf
MAX_TOP_LOGITS = 256  # highest logits to select
MIN_CONTEXT = 2**15  # the context may be set larger than the GGUF states


class NativeSampler:
    """One request's sampler chain with its history, independent of the context. `sampling` must be `checked`."""

    logits = None
    can_be_late = False

    def __init__(self, model: Model, sampling: Sampling, prompt: list[int]) -> None:
        self._lib = lib = model.lib
        self._forced: int | None = None
        bias = _bias(model, sampling)
        self._biased = [token for token, value in bias.items() if value != FORBIDDEN]
        window = max(sampling.repeat_last_n, sampling.dry_penalty_last_n) if _looks_back(sampling) else 0
        self._recent = deque(prompt, maxlen=window)
        kept = 1 if _is_greedy(sampling) else sampling.top_k
        count = kept + len(bias) + window
        self.top_logits = 0 if sampling.mirostat or kept < 1 or count > MAX_TOP_LOGITS else count
        self._chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        for stage in (*_bias_stages(model, bias), *_history_stages(model, sampling), *_choice(model, sampling)):
            lib.llama_sampler_chain_add(self._chain, stage)
        if _looks_back(sampling):
            for token in prompt:
                lib.llama_sampler_accept(self._chain, token)

    @property
    def changed(self) -> Collection[int]:
        return {*self._biased, *self._recent}

    def sample(self, draw: Draw) -> int | None:
        """Sample the next token and add it to the chain's history."""
        if self._forced is None:
            token = draw.token(self._chain)
            self._recent.append(token)
            return token
        token, self._forced = self._forced, None
        self.accept(token)
        return token

    def force(self, token: int) -> None:
        """Make the next `sample` return this token."""
        self._forced = token

    def choice(self, draw: Draw) -> int:
        """Choose one of the draw's entries, without changing the history."""
        return draw.choice(self._chain)

    def choose(self, candidates: Candidates) -> tuple[int, float]:
        """Choose one of the candidates, without changing the history; returns it and its logit."""
        candidates.apply(self._chain)
        return candidates.selected

    def accept(self, token: int) -> None:
        """Add a token to the history."""
        self._lib.llama_sampler_accept(self._chain, token)
        self._recent.append(token)

    def late(self, wait_s: float) -> int | None:
        """Never called: `sample` always returns a token."""
        raise NotImplementedError

    def close(self) -> None:
        """Free the native samplers. Must be called only once."""
        self._lib.llama_sampler_free(self._chain)


def checked(model: Model, sampling: Sampling) -> Sampling:
    """Return `sampling` with values that llama.cpp can take. Raises RequestError for others."""
    context = max(model.n_ctx_train, MIN_CONTEXT)
    try:
        values = sampling_values.checked(msgspec.structs.asdict(sampling), n_vocab=model.n_vocab, context=context)
    except BadValue as error:
        raise RequestError("invalid_value", error.field, str(error)) from None
    return Sampling(**values)


def has_breakers(s: Sampling) -> bool:
    """Whether the chain has DRY breakers: building it then searches the whole vocabulary for each of them."""
    return s.dry_multiplier > 0 and not s.mirostat and bool(s.dry_sequence_breakers)


def _bias(model: Model, sampling: Sampling) -> dict[int, float]:
    banned = [*model.suppressed, *(model.eog_tokens if sampling.ignore_eos else ())]
    return sampling.logit_bias | dict.fromkeys(banned, FORBIDDEN)


def _bias_stages(model: Model, bias: dict[int, float]) -> list[Any]:
    if not bias:
        return []
    lib = model.lib
    entries = (lib.llama_logit_bias * len(bias))(*(lib.llama_logit_bias(token, value) for token, value in bias.items()))
    return [lib.llama_sampler_init_logit_bias(model.n_vocab, len(bias), entries)]


def _penalises(s: Sampling) -> bool:
    return (s.repeat_penalty, s.frequency_penalty, s.presence_penalty) != (1.0, 0.0, 0.0)


def _looks_back(s: Sampling) -> bool:
    return s.mirostat == 0 and (_penalises(s) or s.dry_multiplier > 0)


def _history_stages(model: Model, s: Sampling) -> list[Any]:
    """Stages that depend on earlier tokens, the prompt included. Mirostat has none of them, as in llama-server."""
    lib, stages = model.lib, []
    if s.mirostat:
        return []
    if _penalises(s):
        penalties = (s.repeat_penalty, s.frequency_penalty, s.presence_penalty)
        stages.append(lib.llama_sampler_init_penalties(model.n_vocab, s.repeat_last_n, *penalties))
    if s.dry_multiplier > 0:
        breakers = [text.encode() for text in s.dry_sequence_breakers]
        strings = (ctypes.c_char_p * len(breakers))(*breakers)
        shape = (s.dry_multiplier, s.dry_base, s.dry_allowed_length, s.dry_penalty_last_n)
        stages.append(lib.llama_sampler_init_dry(model.vocab, *shape, strings, len(breakers)))
    return stages


def _is_greedy(s: Sampling) -> bool:
    may_drop_best = s.typical_p < 1 or s.xtc_probability > 0 or s.mirostat
    return s.temperature <= 0 and not may_drop_best


def _choice(model: Model, s: Sampling) -> list[Any]:
    """Stages that narrow the candidates down and select one."""
    lib = model.lib
    if _is_greedy(s):
        return [lib.llama_sampler_init_greedy()]
    seed = secrets.randbits(SEED_BITS) if s.seed is None else s.seed % 2**SEED_BITS
    temperature = lib.llama_sampler_init_temp(s.temperature)
    if s.mirostat == 1:
        tau, eta = s.mirostat_tau, s.mirostat_eta
        return [temperature, lib.llama_sampler_init_mirostat(model.n_vocab, seed, tau, eta, MIROSTAT_M)]
    if s.mirostat == 2:
        return [temperature, lib.llama_sampler_init_mirostat_v2(seed, s.mirostat_tau, s.mirostat_eta)]
    wanted: list[tuple[bool, Callable[[], Any]]] = [
        (s.top_k > 0, lambda: lib.llama_sampler_init_top_k(s.top_k)),
        (s.typical_p < 1, lambda: lib.llama_sampler_init_typical(s.typical_p, MIN_KEEP)),
        (s.top_p < 1, lambda: lib.llama_sampler_init_top_p(s.top_p, MIN_KEEP)),
        (s.min_p > 0, lambda: lib.llama_sampler_init_min_p(s.min_p, MIN_KEEP)),
        (s.xtc_probability > 0, lambda: lib.llama_sampler_init_xtc(s.xtc_probability, s.xtc_threshold, MIN_KEEP, seed)),
    ]
    return [*(make() for use, make in wanted if use), temperature, lib.llama_sampler_init_dist(seed)]
