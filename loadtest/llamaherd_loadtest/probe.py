"""Probes the server before the load: whether it answers, its context size, and how its tokenizer counts our words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import Struct, field

from llamaherd_loadtest.client import ChatClient, Target, clock
from llamaherd_loadtest.rng import seeded
from llamaherd_loadtest.samples import OK, Sample
from llamaherd_loadtest.workload import Calibration, streaming_body, text

_SHORT, _LONG = 16, 144  # words per calibration request
_T = TypeVar("_T")
_TOKENIZED = 1000  # words to tokenize, which costs no generation


class ServerUnusable(Exception):
    """The server cannot be measured; the message gives the cause and the remedy."""


class ServerFacts(Struct, frozen=True):
    """What a server reports: its first model, and the context of a slot in tokens (None if it reports none)."""

    model: str = ""
    context: int | None = None
    is_llamaherd: bool = False


class _Meta(Struct):
    n_ctx: int | None = None  # llama-server and llamaherd


class _Model(Struct):
    id: str
    owned_by: str = ""
    meta: _Meta | None = None
    max_model_len: int | None = None  # vLLM


class _Models(Struct):
    data: list[_Model] = field(default_factory=list)


class _Tokens(Struct):
    tokens: list[msgspec.Raw]


def ask(client: ChatClient, name: str = "") -> ServerFacts:
    """Return what the server reports about model `name` or its first model; nothing if it does not answer."""
    listed = _decoded(client, "/v1/models", None, _Models)
    for model in listed.data if listed else []:
        if name in ("", model.id):
            context = (model.meta and model.meta.n_ctx) or model.max_model_len
            return ServerFacts(model.id, context, model.owned_by == "llamaherd")
    return ServerFacts(name)


def count_tokens(client: ChatClient, content: str) -> int | None:
    """Return the tokens of `content` by POST /tokenize (llama-server and llamaherd); None without that route."""
    answer = _decoded(client, "/tokenize", msgspec.json.encode({"content": content}), _Tokens)
    return len(answer.tokens) if answer else None


def calibrate(
    client: ChatClient, target: Target, seed: int, extra: Mapping[str, Any] | None = None, *, timings: bool = False
) -> Calibration:
    """Find out how the server counts our words, from a short request and /tokenize or else a longer request.

    `extra` holds the fields of requests besides messages and lengths. Raises ServerUnusable without answer or usage.
    """
    short = _prompt_tokens(client, target, seed, _SHORT, extra or {})
    counted = count_tokens(client, text(seeded(seed, "tokenizer"), _TOKENIZED))
    if counted is None:
        long = _prompt_tokens(client, target, seed, _LONG, extra or {})
        per_word = (long - short) / (_LONG - _SHORT)
    else:
        per_word = counted / _TOKENIZED
    if per_word <= 0:
        raise ServerUnusable(f"{target.url} counts no more tokens for {_LONG} words than for {_SHORT}: no tokenizer?")
    return Calibration(per_word, short - _SHORT * per_word, timings)


def check_fits(name: str, longest: int, facts: ServerFacts) -> None:
    """Raise ValueError if requests of `longest` tokens do not fit into a slot."""
    if facts.context is not None and longest > facts.context:
        raise ValueError(
            f"workload {name} sends requests of up to {longest} tokens including answers, but a slot of {facts.model} "
            f"holds {facts.context}: raise the server's context per slot, or use a workload with shorter prompts"
        )


def _prompt_tokens(client: ChatClient, target: Target, seed: int, words: int, extra: Mapping[str, Any]) -> int:
    content = text(seeded(seed, "calibration", words), words)
    sample = Sample(index=0, scheduled=clock())
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1, **extra}
    client.stream(streaming_body(body, target.model), sample)
    if sample.outcome not in (OK, "empty"):
        raise ServerUnusable(f"{target.url} {_cause(sample)}")
    if not sample.prompt_tokens:
        raise ServerUnusable(f"{target.url} reports no usage when streaming (stream_options.include_usage)")
    return sample.prompt_tokens


def _decoded(client: ChatClient, path: str, body: bytes | None, form: type[_T]) -> _T | None:
    try:
        status, answer = client.call(path, body)
        return msgspec.json.decode(answer, type=form) if status == 200 else None
    except (OSError, msgspec.MsgspecError):
        return None


def _cause(sample: Sample) -> str:
    match sample.outcome, sample.detail:
        case "connection", detail if "CERTIFICATE_VERIFY_FAILED" in detail:
            return "has a certificate of an unknown authority: give its CA with --ca"
        case "connection", detail:
            return f"cannot be reached: {detail}"
        case (("http 401" | "http 403"), detail):
            return f"refuses the API key ({detail}): give one with --key-file"
        case "http 400", detail if "tool" in detail:
            return f"does not support tool calls ({detail}): use a workload without tools, such as agent_text"
        case "http 503", detail:
            return f"is not ready: {detail}"
        case outcome, detail:
            return f"does not answer ({outcome}): {detail}"
