"""Receives and prepares requests while steps are computed: on a reader thread, and on lanes if they are slow."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeAlias

from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.wire.errors import RequestError, too_long
from llamaherd_server.wire.evaluation import Evaluate
from llamaherd_server.wire.protocol import (
    Cancel,
    Detokenize,
    Embed,
    Failed,
    Generate,
    Retune,
    Text,
    Tokenize,
    Tokens,
    ToWorker,
)
from llamaherd_server.wire.text import TextStream
from llamaherd_server.worker.channel import Channel
from llamaherd_server.worker.embedding import Job as EmbeddingJob
from llamaherd_server.worker.evaluation import EvaluationJob
from llamaherd_server.worker.forkserver import MOST_TOKENS, SHORT_CHARS, Child, Job, Prepared
from llamaherd_server.worker.interrupt import Interrupt
from llamaherd_server.worker.lanes import Lanes, Task
from llamaherd_server.worker.memory import total_cells
from llamaherd_server.worker.model import Model
from llamaherd_server.worker.prompts import PromptCache
from llamaherd_server.worker.reasoning import BudgetSampler
from llamaherd_server.worker.sampling import NativeSampler, checked, has_breakers
from llamaherd_server.worker.sequence import Sampler, Sequence
from llamaherd_server.worker.texts import Stretch, Texts, split_prompt

Work: TypeAlias = Sequence | EmbeddingJob | EvaluationJob | Cancel | Retune
Owned: TypeAlias = Generate | Tokenize | Detokenize | Embed

SHORT_TOKENS = 2**13


class Intake:
    """Answers requests that need only the vocabulary, and hands the others to the step thread in order of arrival.

    Requests that may be slow to prepare go to the lanes, where others overtake them. The current step is interrupted by
    a reconfiguration, by the cancellation of the request with most of its batch, by a request within the batch window
    of a group's first step, and, if it computes mostly preemptible prompts, by a request that is not preemptible.
    """

    def __init__(
        self,
        channel: Channel,
        model: Model,
        interrupt: Interrupt,
        room: Callable[[], int] = lambda: sys.maxsize,
        prompts: PromptCache | None = None,
    ) -> None:
        """`room` returns the tokens that a slot holds. Prompts that `prompts` has on disk are loaded in advance."""
        self._room = room
        self._prompts = prompts
        self._channel = channel
        self._model = model
        self._texts = prompts.texts if prompts else Texts()
        self._interrupt = interrupt
        self._ready: SimpleQueue[Work | Exception] = SimpleQueue()
        self._lanes = Lanes()
        self._handing_over = threading.Lock()  # so that no cancel slips in between check and queue
        threading.Thread(target=self._read, daemon=True).start()

    def take(self, wait_s: float) -> Iterator[Work]:
        """Yield all prepared work, after waiting up to `wait_s` seconds for the first. Raises Closed."""
        # Before reading the queue, so that whatever arrives after that interrupts the next step.
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
            self._model.parts("", 0, parse_special=True)  # build the cached pattern
            while True:
                for message in self._channel.receive():
                    self._dispatch(message)
        except Exception as error:  # Closed, or a bug: the step thread raises it
            self._ready.put(error)

    def _dispatch(self, message: ToWorker) -> None:
        if isinstance(message, Cancel):
            with self._handing_over:
                self._lanes.cancel(message.id)
                self._ready.put(message)
        elif isinstance(message, Retune):
            self._ready.put(message)
        elif not isinstance(message, Evaluate) and is_slow(message):
            self._lanes.add(Task(message.id, message.owner, partial(self._on_lane, message)))
        else:
            self._prepare(message)
        if isinstance(message, Retune) or (isinstance(message, Cancel) and message.id == self._interrupt.mostly_for):
            self._interrupt.set()

    def _on_lane(self, message: Owned, task: Task) -> None:
        try:
            self._prepare(message, task)
        except Exception as error:  # as in `_read`
            self._ready.put(error)

    def _prepare(self, message: Owned | Evaluate, task: Task | None = None) -> None:
        try:
            if isinstance(message, Tokenize | Detokenize):
                self._channel.send(_vocabulary_answer(self._model, message, task))
                return
            work: Sequence | EmbeddingJob | EvaluationJob
            if isinstance(message, Embed):
                work = job_of(self._model, message, task)
            elif isinstance(message, Evaluate):
                work = evaluation_of(self._model, message)
            else:
                work = sequence_of(self._model, message, task, self._room(), self._texts)
        except RequestError as error:
            self._channel.send(Failed(message.id, error.code, error.message, error.param, error.details))
            return
        if isinstance(work, Sequence) and self._is_on_disk(work):
            if task is None:
                self._lanes.add(Task(message.id, work.request.owner, partial(self._fetch, work)))
            else:
                self._fetch(work, task)
        else:
            self._hand_over(work, task)

    def _hand_over(self, work: Sequence | EmbeddingJob | EvaluationJob, task: Task | None) -> None:
        with self._handing_over:
            if task is None or not task.cancelled:
                self._ready.put(work)
            elif isinstance(work, Sequence):
                work.sampler.close()
        if isinstance(work, Sequence) and (self._interrupt.in_batch_window() or self._takes_precedence(work)):
            self._interrupt.set()

    def _takes_precedence(self, sequence: Sequence) -> bool:
        return self._interrupt.preemptible and not sequence.request.preemptible

    def _is_on_disk(self, sequence: Sequence) -> bool:
        request = sequence.request
        if self._prompts is None or not request.cache_prompt:
            return False
        found = self._prompts.find(request.cache_scope, sequence.tokens, on_disk=True)
        return found is not None and found.on_disk

    def _fetch(self, sequence: Sequence, task: Task) -> None:
        try:
            if self._prompts is not None:
                self._prompts.fetch(sequence.request.cache_scope, sequence.tokens)
            self._hand_over(sequence, task)
        except Exception as error:  # as in `_read`
            self._ready.put(error)


def is_slow(message: Owned) -> bool:
    """Whether preparing the request may take so long that it belongs on a lane, where others overtake it."""
    if isinstance(message, Detokenize):
        return len(message.tokens) > SHORT_TOKENS
    if isinstance(message, Tokenize):
        return len(message.text) > SHORT_CHARS
    if isinstance(message, Embed):
        return sum(map(len, (*message.inputs, message.query or ""))) > SHORT_CHARS
    sampling = message.sampling
    return len(message.prompt) > SHORT_CHARS or sampling.grammar is not None or has_breakers(sampling)


def slot_tokens(settings: EngineSettings) -> int:
    """The maximum length of a sequence in tokens, prompt and output."""
    return min(settings.ctx_per_slot, total_cells(settings))


def sequence_of(
    model: Model,
    request: Generate,
    task: Task | None = None,
    room: int = sys.maxsize,
    texts: Texts | None = None,
) -> Sequence:
    """Prepare a sequence; raises RequestError. If a prompt is far longer than `room`, only its start is tokenised.

    Parts of a long prompt that are in `texts` are not tokenised again.
    """
    if request.max_tokens is not None and request.max_tokens < 1:
        raise RequestError("invalid_value", "max_tokens", f"max_tokens {request.max_tokens} must be at least 1")
    if request.logprobs is not None and not 0 <= request.logprobs <= model.n_vocab:
        message = f"logprobs {request.logprobs} must be between 0 and the vocabulary's {model.n_vocab}"
        raise RequestError("invalid_value", "logprobs", message)
    sampling = checked(model, request.sampling)
    with _read(model, request, sampling.grammar, task, room=room, texts=texts) as (tokens, stretches, child):
        preserved = frozenset(model.control_tokens(request.preserved))
        chain = NativeSampler(model, sampling, tokens)
        sampler: Sampler = chain if child is None else _with_grammar(model, chain, child)
        if request.reasoning:
            sampler = BudgetSampler(model, sampler, request.reasoning)
        borders = model.borders(tokens) if model.recurrent or model.window else []
        return Sequence(request, tokens, sampler, TextStream(request.stop), preserved, borders, stretches)


@contextmanager
def _read(
    model: Model, request: Generate, grammar: str | None, task: Task | None, *, room: int, texts: Texts | None
) -> Iterator[tuple[list[int], list[Stretch], Child | None]]:
    """The prompt's tokens, the position of each text among them, and the grammar's process as in `_prepared`."""
    prompt, add, parse = request.prompt, request.add_special, request.parse_special
    parts = None
    if texts and isinstance(prompt, str) and len(prompt) > SHORT_CHARS:
        parts = split_prompt(model, texts, prompt, request.cache_scope, add_special=add, parse_special=parse)
    if parts:
        job = Job(parts.unknown, parse_special=parse, room=room, beside=parts.known, grammar=grammar)
    else:
        job = Job([prompt] if isinstance(prompt, str) else [], add, parse, room, grammar=grammar)
    with _prepared(model, job, task) as (prepared, child):
        if parts and texts:
            tokens, stretches = parts.whole(texts, prepared.tokens)
        else:
            tokens, stretches = prompt if isinstance(prompt, list) else prepared.tokens[0], []
        yield _checked_tokens(model, tokens, "prompt"), stretches, child


def _with_grammar(model: Model, chain: NativeSampler, child: Child) -> Sampler:
    from llamaherd_server.worker.grammar import GrammarSampler  # noqa: PLC0415 (numpy, 25 MiB, rarely needed)

    return GrammarSampler(model, chain, child)


@contextmanager
def _prepared(model: Model, job: Job, task: Task | None = None) -> Iterator[tuple[Prepared, Child | None]]:
    """The tokens of the job's texts, and its grammar's process, if any, which ends if the block raises."""
    if job.grammar is None and sum(map(len, job.texts)) <= SHORT_CHARS:
        add, parse = job.add_special, job.parse_special
        tokens = [model.tokenize(text, add_special=add, parse_special=parse) for text in job.texts]
        yield Prepared(tokens, sum(map(len, tokens))), None
        return
    child = model.forkserver.open(job)
    if task is not None:
        task.stop = child.close
    try:
        yield child.prepared(), None if job.grammar is None else child
    except BaseException:
        child.close()
        raise
    if job.grammar is None:
        child.close()


def fit(sequence: Sequence, room: int) -> None:
    """Set the sequence's limit in a slot of `room` tokens; raises RequestError if its prompt does not fit."""
    if sequence.n_prompt >= room:
        raise too_long(sequence.n_prompt, room)
    new = sequence.request.max_tokens
    sequence.limit = room if new is None else min(room, sequence.n_prompt + new)


def job_of(model: Model, request: Embed, task: Task | None = None) -> EmbeddingJob:
    """Tokenise the inputs. Raises RequestError if one is empty or has unknown tokens, or the model is unsuitable."""
    if (request.query is None) == model.ranks:
        message = "this model ranks documents: use /v1/rerank" if model.ranks else "this model does not rank documents"
        raise RequestError("unsupported", None, message)
    texts = [one for one in request.inputs if isinstance(one, str)]
    if request.query is not None:
        return EmbeddingJob(request, _pairs(model, request.query, texts, task))
    with _prepared(model, Job(texts, add_special=True), task) as (prepared, _):
        rest = iter(prepared.tokens)
        lists = [next(rest) if isinstance(one, str) else one for one in request.inputs]
        return EmbeddingJob(request, [_checked_tokens(model, one, "input") for one in lists])


def evaluation_of(model: Model, request: Evaluate) -> EvaluationJob:
    """Raises RequestError if an input is empty or has unknown tokens."""
    for one in request.inputs:
        _checked_tokens(model, one.tokens, "input")
    return EvaluationJob(request)


def _pairs(model: Model, query: str, documents: list[str], task: Task | None = None) -> list[list[int]]:
    """A reranker's inputs as llama-server builds them: by the GGUF's template, or joined with special tokens."""
    lib, vocab = model.lib, model.vocab
    if template := lib.llama_model_chat_template(model.handle, b"rerank"):
        texts = [
            template.decode(errors="replace").replace("{query}", query).replace("{document}", document)
            for document in documents
        ]
        with _prepared(model, Job(texts), task) as (prepared, _):
            return prepared.tokens
    with _prepared(model, Job([query, *documents], parse_special=False), task) as (prepared, _):
        first, *rest = prepared.tokens
        eos = lib.llama_vocab_eos(vocab)
        end = [lib.llama_vocab_sep(vocab) if eos < 0 else eos] * lib.llama_vocab_get_add_eos(vocab)
        between = [*end, *[lib.llama_vocab_sep(vocab)] * lib.llama_vocab_get_add_sep(vocab)]
        begin = [lib.llama_vocab_bos(vocab)] * lib.llama_vocab_get_add_bos(vocab)
        return [[*begin, *first, *between, *document, *end] for document in rest]


def _vocabulary_answer(model: Model, message: Tokenize | Detokenize, task: Task | None = None) -> Tokens | Text:
    if isinstance(message, Tokenize):
        most = None if message.counted else MOST_TOKENS
        job = Job([message.text], message.add_special, message.parse_special, most=most, counted=message.counted)
        with _prepared(model, job, task) as (prepared, _):
            return Tokens(message.id, prepared.count, [] if message.counted else prepared.tokens[0])
    unknown = model.unknown(message.tokens)
    if unknown is not None:
        raise RequestError("invalid_value", "tokens", f"token {unknown} is not in the vocabulary")
    if message.apart:
        return Text(message.id, "", model.pieces_of(message.tokens))
    return Text(message.id, model.detokenize(message.tokens))


def _checked_tokens(model: Model, tokens: list[int], param: str) -> list[int]:
    """Return the tokens of the field `param`; raises RequestError if they are empty or not in the vocabulary."""
    if not tokens:
        raise RequestError("invalid_value", param, f"the {param} is empty")
    unknown = model.unknown(tokens)
    if unknown is not None:
        message = f"token {unknown} is not in the vocabulary of {model.n_vocab} tokens"
        raise RequestError("invalid_value", param, message)
    return tokens
