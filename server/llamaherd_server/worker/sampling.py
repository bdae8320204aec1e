"""Native sampler chains in llama-server's order: bias, penalties, DRY, top-k, typical, top-p, min-p, XTC, temperature.

A grammar is kept to as llama-server does it: a token that it forbids is sampled again from those that it allows.
"""

from __future__ import annotations

import ctypes
import math
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llamaherd_server.protocol import Sampling
from llamaherd_server.worker.errors import RequestError
from llamaherd_server.worker.lib import silenced
from llamaherd_server.worker.model import Model

if TYPE_CHECKING:
    from llamaherd_server.worker.logits import Candidates

SEED_BITS = 32
MIROSTAT_M = 100  # tokens that the estimate of the paper's s uses
MIN_KEEP = 0
FORBIDDEN = -math.inf
WHOLE_CONTEXT = -1  # as a number of last tokens to look at


class NativeSampler:
    """One request's chain, with its history; it outlives a rebuilt context. Raises RequestError."""

    def __init__(self, model: Model, sampling: Sampling, prompt: list[int]) -> None:
        _check(model, sampling)
        self._model = model
        self._lib = lib = model.lib
        self._grammar = None if sampling.grammar is None else _Grammar(model, sampling.grammar)
        self._chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        for stage in (*_bias_stages(model, sampling), *_history_stages(model, sampling), *_choice(model, sampling)):
            lib.llama_sampler_chain_add(self._chain, stage)
        if _looks_back(sampling):
            for token in prompt:
                lib.llama_sampler_accept(self._chain, token)

    def sample(self, context: Any, row: int) -> int:
        """The next token from batch row `row` of the last llama_decode; the chain's history gets it too."""
        if self._grammar is None:
            return int(self._lib.llama_sampler_sample(self._chain, context, row))
        token = self._grammar.sample(self._chain, context, row)
        self._lib.llama_sampler_accept(self._chain, token)
        return token

    def close(self) -> None:
        """Free the native samplers; once only."""
        self._lib.llama_sampler_free(self._chain)
        if self._grammar is not None:
            self._grammar.close()


class _Grammar:
    """What the output may be. Tokens are checked before llama.cpp accepts them: a forbidden one aborts the process."""

    def __init__(self, model: Model, text: str) -> None:
        self._lib = model.lib
        with silenced():
            self._sampler = model.lib.llama_sampler_init_grammar(model.vocab, text.encode(), b"root")
        if not self._sampler:
            message = "the grammar does not compile: it must be GBNF with a rule named root"
            raise RequestError("invalid_grammar", "grammar", message)
        self._candidates = _candidates(model)

    def sample(self, chain: Any, context: Any, row: int) -> int:
        token = self._choose(chain, context, row)
        if not self._allows(token):
            token = self._choose(chain, context, row, self._sampler)
        self._lib.llama_sampler_accept(self._sampler, token)
        return token

    def close(self) -> None:
        self._lib.llama_sampler_free(self._sampler)

    def _choose(self, chain: Any, context: Any, row: int, *before: Any) -> int:
        self._candidates.load(context, row)
        for sampler in (*before, chain):
            self._candidates.apply(sampler)
        token, logit = self._candidates.selected
        if before and logit == FORBIDDEN:
            raise RequestError("invalid_grammar", "grammar", "the grammar allows no token here that the request does")
        return token

    def _allows(self, token: int) -> bool:
        one = self._lib.llama_token_data(token, 1.0, 0.0)
        array = self._lib.llama_token_data_array(ctypes.pointer(one), 1, -1, False)
        self._lib.llama_sampler_apply(self._sampler, ctypes.byref(array))
        return bool(one.logit != FORBIDDEN)


def _candidates(model: Model) -> Candidates:
    from llamaherd_server.worker.logits import Candidates  # noqa: PLC0415 (numpy, 25 MiB that few need)

    return Candidates(model)


def _check(model: Model, sampling: Sampling) -> None:
    """Refuse what llama.cpp would stumble over."""
    unknown = model.unknown(list(sampling.logit_bias))
    if unknown is not None:
        message = f"logit_bias: token {unknown} is not in the vocabulary of {model.n_vocab} tokens"
        raise RequestError("invalid_value", "logit_bias", message)
    for name in ("repeat_penalty", "dry_base", "mirostat_tau", "mirostat_eta"):
        value = getattr(sampling, name)
        if not (math.isfinite(value) and value > 0):
            raise RequestError("invalid_value", name, f"{name} {value} must be a number above 0")
    if sampling.mirostat not in (0, 1, 2):
        raise RequestError("invalid_value", "mirostat", f"mirostat {sampling.mirostat} must be 0 (off), 1 or 2")


def _bias_stages(model: Model, sampling: Sampling) -> list[Any]:
    banned = [*model.suppressed, *(model.eog_tokens if sampling.ignore_eos else ())]
    bias = sampling.logit_bias | dict.fromkeys(banned, FORBIDDEN)
    if not bias:
        return []
    lib = model.lib
    entries = (lib.llama_logit_bias * len(bias))(*(lib.llama_logit_bias(token, value) for token, value in bias.items()))
    return [lib.llama_sampler_init_logit_bias(model.n_vocab, len(bias), entries)]


def _penalises(s: Sampling) -> bool:
    return (s.repeat_penalty, s.frequency_penalty, s.presence_penalty) != (1.0, 0.0, 0.0)


def _looks_back(s: Sampling) -> bool:
    return s.mirostat == 0 and (_penalises(s) or s.dry_multiplier > 0)


def _last_n(model: Model, tokens: int) -> int:
    return int(model.lib.llama_model_n_ctx_train(model.handle)) if tokens == WHOLE_CONTEXT else tokens


def _history_stages(model: Model, s: Sampling) -> list[Any]:
    """What looks back at the tokens so far, the prompt's too. Mirostat takes none of it, as in llama-server."""
    lib, stages = model.lib, []
    if s.mirostat:
        return []
    if _penalises(s):
        penalties = (s.repeat_penalty, s.frequency_penalty, s.presence_penalty)
        stages.append(lib.llama_sampler_init_penalties(model.n_vocab, _last_n(model, s.repeat_last_n), *penalties))
    if s.dry_multiplier > 0:
        breakers = [text.encode() for text in s.dry_sequence_breakers]
        strings = (ctypes.c_char_p * len(breakers))(*breakers)
        shape = (s.dry_multiplier, s.dry_base, s.dry_allowed_length, _last_n(model, s.dry_penalty_last_n))
        stages.append(lib.llama_sampler_init_dry(model.vocab, *shape, strings, len(breakers)))
    return stages


def _choice(model: Model, s: Sampling) -> list[Any]:
    """What narrows the candidates down and takes one."""
    lib = model.lib
    cuts_the_best = s.typical_p < 1 or s.xtc_probability > 0 or s.mirostat
    if s.temperature <= 0 and not cuts_the_best:
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
