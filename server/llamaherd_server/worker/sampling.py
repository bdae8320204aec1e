"""Native sampler chains in llama-server's order: bias, grammar, penalties, DRY, top-k, typical, top-p, min-p, XTC."""

from __future__ import annotations

import ctypes
import math
import secrets
from collections.abc import Callable
from typing import Any

from llamaherd_server.protocol import Sampling

SEED_BITS = 32
MIROSTAT_M = 100  # tokens that the estimate of the paper's s uses, as in llama-server


class SamplingError(ValueError):
    """A sampling parameter that cannot be honoured; `param` names it."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class Sampler:
    """One request's chain; raises SamplingError. It lives as long as the request, across a rebuilt context."""

    def __init__(self, lib: Any, vocab: Any, sampling: Sampling, eog_tokens: list[int], prompt: list[int]) -> None:
        self._lib = lib
        self.chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        add = lib.llama_sampler_chain_add
        if bias := dict(sampling.logit_bias) | (dict.fromkeys(eog_tokens, -math.inf) if sampling.ignore_eos else {}):
            add(self.chain, _logit_bias(lib, vocab, bias))
        if sampling.grammar is not None:
            grammar = lib.llama_sampler_init_grammar(vocab, sampling.grammar.encode(), b"root")
            if not grammar:
                self.close()
                raise SamplingError("grammar", "the grammar does not compile: check it against llama.cpp's GBNF guide")
            add(self.chain, grammar)
        for stage in _history_stages(lib, vocab, sampling):
            for token in prompt:
                lib.llama_sampler_accept(stage, token)
            add(self.chain, stage)
        for stage in _choice_stages(lib, vocab, sampling):
            add(self.chain, stage)

    def close(self) -> None:
        if self.chain:
            self._lib.llama_sampler_free(self.chain)
            self.chain = None


def _logit_bias(lib: Any, vocab: Any, bias: dict[int, float]) -> Any:
    entries = (lib.llama_logit_bias * len(bias))(*(lib.llama_logit_bias(token, value) for token, value in bias.items()))
    return lib.llama_sampler_init_logit_bias(lib.llama_vocab_n_tokens(vocab), len(bias), entries)


def _history_stages(lib: Any, vocab: Any, s: Sampling) -> list[Any]:
    """What looks back at the tokens so far, the prompt's too."""
    stages = []
    if (s.repeat_penalty, s.frequency_penalty, s.presence_penalty) != (1.0, 0.0, 0.0):
        n_vocab = lib.llama_vocab_n_tokens(vocab)
        penalties = (s.repeat_penalty, s.frequency_penalty, s.presence_penalty)
        stages.append(lib.llama_sampler_init_penalties(n_vocab, s.repeat_last_n, *penalties))
    if s.dry_multiplier > 0:
        breakers = [text.encode() for text in s.dry_sequence_breakers]
        strings = (ctypes.c_char_p * len(breakers))(*breakers)
        shape = (s.dry_multiplier, s.dry_base, s.dry_allowed_length, s.dry_penalty_last_n)
        stages.append(lib.llama_sampler_init_dry(vocab, *shape, strings, len(breakers)))
    return stages


def _choice_stages(lib: Any, vocab: Any, s: Sampling) -> list[Any]:
    """What narrows the candidates down and takes one."""
    if s.temperature <= 0:
        return [lib.llama_sampler_init_greedy()]
    seed = secrets.randbits(SEED_BITS) if s.seed is None else s.seed % 2**SEED_BITS
    temperature = lib.llama_sampler_init_temp(s.temperature)
    if s.mirostat == 1:
        n_vocab = lib.llama_vocab_n_tokens(vocab)
        return [temperature, lib.llama_sampler_init_mirostat(n_vocab, seed, s.mirostat_tau, s.mirostat_eta, MIROSTAT_M)]
    if s.mirostat == 2:
        return [temperature, lib.llama_sampler_init_mirostat_v2(seed, s.mirostat_tau, s.mirostat_eta)]
    wanted: list[tuple[bool, Callable[[], Any]]] = [
        (s.top_k > 0, lambda: lib.llama_sampler_init_top_k(s.top_k)),
        (s.typical_p < 1, lambda: lib.llama_sampler_init_typical(s.typical_p, 1)),
        (s.top_p < 1, lambda: lib.llama_sampler_init_top_p(s.top_p, 1)),
        (s.min_p > 0, lambda: lib.llama_sampler_init_min_p(s.min_p, 1)),
        (s.xtc_probability > 0, lambda: lib.llama_sampler_init_xtc(s.xtc_probability, s.xtc_threshold, 1, seed)),
    ]
    return [*(make() for use, make in wanted if use), temperature, lib.llama_sampler_init_dist(seed)]
