"""llama-server's response object for a finished generation."""

from __future__ import annotations

from typing import Any

import msgspec

from llamaherd_server.api.llama_fields import SAMPLERS
from llamaherd_server.wire.protocol import Finished, Generate

# Samplers and options that the embedded engine does not have, with the values that llama-server reports for "off".
_OFF = {
    **{"dynatemp_range": 0.0, "dynatemp_exponent": 1.0, "top_n_sigma": -1.0, "adaptive_target": -1.0},
    **{"adaptive_decay": 0.9, "min_keep": 0, "n_keep": 0, "n_discard": 0, "post_sampling_probs": False, "lora": []},
    **{"samplers": SAMPLERS, "backend_sampling": False, "speculative.types": "none", "preserved_tokens": []},
    **{"grammar_lazy": False, "grammar_triggers": [], "chat_format": "Content-only", "generation_prompt": ""},
    **{"reasoning_format": "none", "reasoning_in_content": False},
}
_RANDOM_SEED = 2**32 - 1


def native_answer(
    request: Generate, model: str, index: int, end: Finished, content: str, **shown: Any
) -> dict[str, Any]:
    """Return llama-server's object for a finished generation. `shown` is added to its `generation_settings`."""
    most = request.max_tokens
    return {
        "index": index,
        "content": content,
        "tokens": [],
        "id_slot": -1,
        "stop": True,
        "model": model,
        "tokens_predicted": end.completion_tokens,
        "tokens_evaluated": end.prompt_tokens,
        "generation_settings": generation_settings(request, **shown),
        "prompt": request.prompt,
        "has_new_line": "\n" in content,
        "truncated": end.reason == "length" and (most is None or end.completion_tokens < most),
        "stop_type": "limit" if end.reason == "length" else "word" if end.stop else "eos",
        "stopping_word": end.stop or "",
        "tokens_cached": end.prompt_tokens + end.completion_tokens,
        "timings": timings_object(end),
    }


def generation_settings(request: Generate, **shown: Any) -> dict[str, Any]:
    """Return a request's sampling parameters as llama-server reports them."""
    most = -1 if request.max_tokens is None else request.max_tokens
    return {
        **msgspec.structs.asdict(request.sampling),
        "seed": _RANDOM_SEED if request.sampling.seed is None else request.sampling.seed,
        "logit_bias": [{"token": token, "bias": bias} for token, bias in request.sampling.logit_bias.items()],
        "grammar": request.sampling.grammar or "",
        "stop": request.stop,
        **{"max_tokens": most, "n_predict": most, "n_probs": 0, "stream": False, "timings_per_token": False},
        **_OFF,
        **shown,
    }


def timings_object(event: Finished) -> dict[str, Any]:
    """Return the timings of one generation in llama-server's format."""
    prompt_n = event.prompt_tokens - event.cached_tokens
    drafts = {"draft_n": event.drafted_tokens, "draft_n_accepted": event.accepted_tokens}
    return {
        "cache_n": event.cached_tokens,
        **_rates("prompt", prompt_n, event.prompt_s),
        **_rates("predicted", event.completion_tokens, event.decode_s, untimed=1),  # prompt_s includes the first
        **(drafts if event.drafted_tokens else {}),
    }


def _rates(name: str, count: int, seconds: float, untimed: int = 0) -> dict[str, float]:
    """Return the timing fields for `count` tokens, of which `untimed` were computed before the `seconds` began."""
    timed = max(0, count - untimed)
    return {
        f"{name}_n": count,
        f"{name}_ms": seconds * 1000,
        f"{name}_per_token_ms": seconds * 1000 / timed if timed else 0.0,
        f"{name}_per_second": timed / seconds if timed and seconds else 0.0,
    }
