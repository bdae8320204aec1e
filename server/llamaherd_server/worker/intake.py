"""What the front end asks for, made ready beside the steps: on a thread that reads, tokenises and compiles grammars."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from typing import TypeAlias

from llamaherd_server.protocol import (
    Cancel,
    Detokenize,
    Embed,
    EngineSettings,
    Failed,
    Generate,
    Retune,
    Text,
    Tokenize,
    Tokens,
    ToWorker,
)
from llamaherd_server.worker.channel import Channel
from llamaherd_server.worker.embedding import Job
from llamaherd_server.worker.errors import RequestError
from llamaherd_server.worker.interrupt import Interrupt
from llamaherd_server.worker.memory import total_cells
from llamaherd_server.worker.model import Model
from llamaherd_server.worker.sampling import NativeSampler
from llamaherd_server.worker.sequence import Sequence
from llamaherd_server.worker.text import TextStream

Work: TypeAlias = Sequence | Job | Cancel | Retune


class Intake:
    """Answers what needs the vocabulary only, and hands the rest to the step thread, in the order that it came.

    A retune stops the step that is being computed, and so does cancelling the request that has most of its batch. A
    request that comes just after others stops their first step, to be in it: they arrived together.
    """

    def __init__(self, channel: Channel, model: Model, interrupt: Interrupt) -> None:
        self._channel = channel
        self._model = model
        self._interrupt = interrupt
        self._ready: SimpleQueue[Work | Exception] = SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def take(self, wait_s: float) -> Iterator[Work]:
        """All that is ready, after waiting at most `wait_s` seconds for something. Raises Closed."""
        # Before looking: whatever comes later than that look stops the next step.
        self._interrupt.clear()
        try:
            while True:
                work = self._ready.get(wait_s > 0, wait_s)
                if isinstance(work, Exception):
                    raise work
                yield work
                wait_s = 0
        except Empty:
            return

    def _read(self) -> None:
        try:
            while True:
                for message in self._channel.receive():
                    self._take_in(message)
        except Exception as error:  # Closed, or a bug: the step thread ends with it
            self._ready.put(error)

    def _take_in(self, message: ToWorker) -> None:
        try:
            if isinstance(message, Tokenize | Detokenize):
                self._channel.send(_with_vocabulary(self._model, message))
            elif isinstance(message, Generate):
                self._ready.put(sequence_of(self._model, message))
                if self._interrupt.joins():
                    self._interrupt.set()
            elif isinstance(message, Embed):
                self._ready.put(job_of(self._model, message))
            else:
                self._ready.put(message)
                if isinstance(message, Retune) or message.id == self._interrupt.mostly_for:
                    self._interrupt.set()
        except RequestError as error:
            self._channel.send(Failed(message.id, error.code, error.message, error.param))


def slot_tokens(settings: EngineSettings) -> int:
    """The tokens that one sequence may have, prompt and output."""
    return min(settings.ctx_per_slot, total_cells(settings))


def sequence_of(model: Model, request: Generate) -> Sequence:
    """Raises RequestError before anything is computed."""
    tokens = _known(model, request.prompt, "prompt", add=request.add_special, parse=request.parse_special)
    if request.max_tokens is not None and request.max_tokens < 1:
        raise RequestError("invalid_value", "max_tokens", f"max_tokens {request.max_tokens} must be at least 1")
    if request.logprobs is not None and not 0 <= request.logprobs <= model.n_vocab:
        message = f"logprobs {request.logprobs} must be between 0 and the vocabulary's {model.n_vocab}"
        raise RequestError("invalid_value", "logprobs", message)
    preserved = frozenset(model.control_tokens(request.preserved))
    sampler = NativeSampler(model, request.sampling, tokens)
    return Sequence(request, tokens, sampler, TextStream(request.stop), preserved)


def fit(sequence: Sequence, room: int) -> None:
    """Set what the sequence may grow to in a slot of `room` tokens; raises RequestError where it has no room at all."""
    if sequence.n_prompt >= room:
        message = f"the prompt has {sequence.n_prompt} tokens, a slot holds {room}: shorten it or raise ctx_per_slot"
        raise RequestError("context_length_exceeded", "prompt", message)
    new = sequence.request.max_tokens
    sequence.limit = room if new is None else min(room, sequence.n_prompt + new)


def job_of(model: Model, request: Embed) -> Job:
    """Raises RequestError where an input has no tokens, or unknown ones."""
    if (request.query is None) == model.ranks:
        message = "this model ranks documents: use /v1/rerank" if model.ranks else "this model does not rank documents"
        raise RequestError("unsupported", None, message)
    if request.query is not None:
        return Job(request, [_pair(model, request.query, one) for one in request.inputs if isinstance(one, str)])
    return Job(request, [_known(model, one, "input") for one in request.inputs])


def _pair(model: Model, query: str, document: str) -> list[int]:
    """What a ranking model reads, as llama-server makes it: by the GGUF's template, or both with marks between."""
    lib, vocab = model.lib, model.vocab
    if template := lib.llama_model_chat_template(model.handle, b"rerank"):
        text = template.decode(errors="replace").replace("{query}", query).replace("{document}", document)
        return model.tokenize(text, add_special=False, parse_special=True)
    eos = lib.llama_vocab_eos(vocab)
    end = [lib.llama_vocab_sep(vocab) if eos < 0 else eos] * lib.llama_vocab_get_add_eos(vocab)
    parts = (model.tokenize(text, add_special=False, parse_special=False) for text in (query, document))
    between = [*end, *[lib.llama_vocab_sep(vocab)] * lib.llama_vocab_get_add_sep(vocab)]
    begin = [lib.llama_vocab_bos(vocab)] * lib.llama_vocab_get_add_bos(vocab)
    return [*begin, *next(parts), *between, *next(parts), *end]


def _with_vocabulary(model: Model, message: Tokenize | Detokenize) -> Tokens | Text:
    if isinstance(message, Tokenize):
        add, parse = message.add_special, message.parse_special
        return Tokens(message.id, model.tokenize(message.text, add_special=add, parse_special=parse))
    unknown = model.unknown(message.tokens)
    if unknown is not None:
        raise RequestError("invalid_value", "tokens", f"token {unknown} is not in the vocabulary")
    return Text(message.id, model.detokenize(message.tokens))


def _known(model: Model, text: str | list[int], param: str, *, add: bool = True, parse: bool = True) -> list[int]:
    """The tokens of the field `param`; raises RequestError where there are none or unknown ones."""
    tokens = model.tokenize(text, add_special=add, parse_special=parse) if isinstance(text, str) else text
    if not tokens:
        raise RequestError("invalid_value", param, f"the {param} is empty")
    unknown = model.unknown(tokens)
    if unknown is not None:
        message = f"token {unknown} is not in the vocabulary of {model.n_vocab} tokens"
        raise RequestError("invalid_value", param, message)
    return tokens
