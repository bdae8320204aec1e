"""Converts generations to requests of llama-server's own API, and its responses to our events and errors.

Source: tools/server/README.md of the pinned llama.cpp.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import msgspec

from llamaherd_server.engine.base import Event
from llamaherd_server.wire.errors import EngineError
from llamaherd_server.wire.protocol import (
    Delta,
    ErrorCode,
    Finished,
    Generate,
    Logprob,
    ReasoningBudget,
    Started,
    TokenLogprob,
)
from llamaherd_server.wire.sse import sent_events

_ITS_FAILURE = re.compile("Compute error|Context size has been exceeded|failed to |Invalid input batch")


def completion_body(request: Generate, prompt: str | list[int] | dict[str, Any]) -> dict[str, Any]:
    """Return the body of POST /completion. The fields of Sampling have llama-server's names."""
    sampling = msgspec.structs.asdict(request.sampling)
    return {
        **{name: value for name, value in sampling.items() if value is not None},
        "seed": -1 if request.sampling.seed is None else request.sampling.seed,
        # JSON has no infinity; llama-server takes false as a bias of minus infinity
        "logit_bias": [(token, bias > -math.inf and bias) for token, bias in request.sampling.logit_bias.items()],
        "prompt": prompt,
        "n_predict": -1 if request.max_tokens is None else request.max_tokens,
        "stop": request.stop,
        "preserved_tokens": request.preserved,
        "n_probs": 0 if request.logprobs is None else max(1, request.logprobs),
        "cache_prompt": request.cache_prompt,
        "stream": True,
        "return_progress": True,
        **(_reasoning(request.reasoning) if request.reasoning else {}),
    }


def _reasoning(budget: ReasoningBudget) -> dict[str, Any]:
    # llama-server's sampler does not see the prompt: pass it the tag if the prompt ends inside the reasoning
    begun = {"generation_prompt": budget.begin} if budget.begun else {}
    return {
        "reasoning_budget_tokens": budget.tokens,
        "reasoning_budget_start_tag": budget.begin,
        "reasoning_budget_end_tags": [budget.end],
        "reasoning_budget_message": "",  # required: without this field llama-server does not write the end tag
        **begun,
    }


async def events_of(response: httpx.Response, request: Generate) -> AsyncGenerator[Event, None]:
    started = False
    generated = 0
    async for event in sent_events(response.aiter_bytes()):
        if not event.data.startswith("{"):
            continue
        chunk = json.loads(event.data)
        if "error" in chunk:
            raise error_of(event.data)
        if not started:
            cached = chunk.get("prompt_progress", {}).get("cache", 0)
            yield Started(request.id, chunk["tokens_evaluated"], cached)
            started = True
        if "prompt_progress" in chunk:
            continue
        count, generated = chunk["tokens_predicted"] - generated, chunk["tokens_predicted"]
        if count or chunk["content"]:
            logprobs = [_logprob(one, request.logprobs) for one in chunk.get("completion_probabilities", ())]
            yield Delta(id=request.id, text=chunk["content"], n_tokens=count, logprobs=logprobs or None)
        if chunk["stop"]:
            timings = chunk["timings"]
            yield Finished(
                id=request.id,
                reason="length" if chunk["stop_type"] == "limit" else "stop",
                prompt_tokens=chunk["tokens_evaluated"],
                cached_tokens=timings["cache_n"],
                completion_tokens=generated,
                prompt_s=timings["prompt_ms"] / 1000,
                decode_s=timings["predicted_ms"] / 1000,
                stop=chunk["stopping_word"] or None,
                drafted_tokens=timings.get("draft_n", 0),
                accepted_tokens=timings.get("draft_n_accepted", 0),
            )
            return
    raise EngineError("engine_crashed", "the engine ended while it worked on this request")


def _logprob(token: dict[str, Any], wanted: int | None) -> TokenLogprob:
    top = [Logprob(one["id"], bytes(one["bytes"]), one["logprob"]) for one in token["top_logprobs"][:wanted]]
    return TokenLogprob(token["id"], bytes(token["bytes"]), token["logprob"], top)


def error_of(text: str) -> EngineError:
    """Convert llama-server's error object to an EngineError."""
    try:
        body = json.loads(text)
    except ValueError:
        return EngineError("internal", "llama-server answered with an error that is not JSON")
    error = body.get("error", body)
    status, kind, message = error.get("code"), error.get("type"), str(error.get("message", "llama-server failed"))
    if kind == "exceed_context_size_error":
        details = {name: error[name] for name in ("n_prompt_tokens", "n_ctx") if name in error}
        return EngineError("context_length_exceeded", message, "prompt", details)
    if "grammar" in message:
        return EngineError("invalid_grammar", message, "grammar")
    if status == 501:
        hint = ': put "--embeddings", "--pooling", "mean" into engine.extra_args' if "--embeddings" in message else ""
        return EngineError("unsupported", message + hint)
    if status == 503:
        return EngineError("engine_stopped", message)
    if "too large to process" in message:  # an embedding input longer than a ubatch
        code: ErrorCode = "context_length_exceeded"
    else:  # llama-server also responds with 500 to most malformed requests
        code = "internal" if status != 400 and _ITS_FAILURE.search(message) else "invalid_value"
    return EngineError(code, message)
