"""A Generate message into a sequence that can run, or the reason why it cannot."""

from __future__ import annotations

from llamaherd_server.protocol import EngineSettings, Generate
from llamaherd_server.worker.errors import RequestError
from llamaherd_server.worker.memory import total_cells
from llamaherd_server.worker.model import Model
from llamaherd_server.worker.sampling import NativeSampler
from llamaherd_server.worker.sequence import Sequence
from llamaherd_server.worker.text import TextStream


def slot_tokens(settings: EngineSettings) -> int:
    """The tokens that one sequence may have, prompt and output."""
    return min(settings.ctx_per_slot, total_cells(settings))


def sequence_of(model: Model, settings: EngineSettings, request: Generate) -> Sequence:
    """Raises RequestError before anything is computed."""
    tokens = _prompt_tokens(model, request)
    room = slot_tokens(settings)
    if len(tokens) >= room:
        message = f"the prompt has {len(tokens)} tokens, a slot holds {room}: shorten it or raise ctx_per_slot"
        raise RequestError("context_length_exceeded", "prompt", message)
    if request.max_tokens is not None and request.max_tokens < 1:
        raise RequestError("invalid_value", "max_tokens", f"max_tokens {request.max_tokens} must be at least 1")
    if request.logprobs is not None and not 0 <= request.logprobs <= model.n_vocab:
        message = f"logprobs {request.logprobs} must be between 0 and the vocabulary's {model.n_vocab}"
        raise RequestError("invalid_value", "logprobs", message)
    sampler = NativeSampler(model, request.sampling, tokens)
    return Sequence(request, tokens, sampler, TextStream(request.stop), limit(request, len(tokens), room))


def limit(request: Generate, n_prompt: int, room: int) -> int:
    """The tokens that the request may grow to in a slot of `room` tokens."""
    return room if request.max_tokens is None else min(room, n_prompt + request.max_tokens)


def _prompt_tokens(model: Model, request: Generate) -> list[int]:
    prompt = request.prompt
    if isinstance(prompt, str):
        tokens = model.tokenize(prompt, add_special=request.add_special, parse_special=request.parse_special)
    else:
        tokens = prompt
    if not tokens:
        raise RequestError("invalid_value", "prompt", "the prompt is empty")
    unknown = model.unknown(tokens)
    if unknown is not None:
        message = f"token {unknown} is not in the vocabulary of {model.n_vocab} tokens"
        raise RequestError("invalid_value", "prompt", message)
    return tokens
