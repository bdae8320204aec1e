"""Log probabilities of given tokens: a context over the same weights, made for one job and freed at its end.

It is computed in bounded pieces between the steps of the generating context, whose KV cells it never touches.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.wire.errors import DecodeFailed, RequestError
from llamaherd_server.wire.evaluation import Evaluate, Evaluated, Evaluation
from llamaherd_server.wire.protocol import Failed
from llamaherd_server.worker.backend import ABORTED, DONE
from llamaherd_server.worker.batch import Batch
from llamaherd_server.worker.context import new_context
from llamaherd_server.worker.interrupt import Interrupt
from llamaherd_server.worker.memory import DoesNotFit, check_fits, context_bytes, total_cells
from llamaherd_server.worker.model import Model

# Tokens that are computed at a time; the second, what a stream waits, is small, as each row is looked through here.
PIECE, PIECE_BESIDE = 128, 16


@dataclass(eq=False, slots=True)
class Rows:
    """What Evaluation holds, as far as it is known."""

    logprobs: array[float] = field(default_factory=lambda: array("f"))
    top_tokens: bytearray = field(default_factory=bytearray)
    top_logprobs: bytearray = field(default_factory=bytearray)


@dataclass(eq=False, slots=True)
class EvaluationJob:
    """One Evaluate message and its answer so far; the first `computed` tokens of the input at hand are in the cells."""

    request: Evaluate
    slot: int = 0
    computed: int = 0
    draft: list[int] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=lambda: [Rows()])

    @property
    def id(self) -> int:
        return self.request.id

    @property
    def tokens(self) -> list[int]:
        return self.request.inputs[len(self.rows) - 1].tokens

    @property
    def start(self) -> int:
        return self.request.inputs[len(self.rows) - 1].start

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def longest(self) -> int:
        return max(len(one.tokens) for one in self.request.inputs)

    def begin_again(self, *, whole: bool) -> None:
        """Forget what was computed of the input at hand, or of the `whole` job."""
        self.computed = 0
        self.rows[-1 if not whole else 0 :] = [Rows()]


class Evaluator:
    """Jobs in, answers out, a piece at each `step`. Like the scheduler it belongs to the thread that computes."""

    def __init__(self, model: Model, interrupt: Interrupt) -> None:
        self._model, self._lib, self._interrupt = model, model.lib, interrupt
        self._context: Any = None
        self._settings = EngineSettings()
        self._queue: deque[EvaluationJob] = deque()

    @property
    def idle(self) -> bool:
        return not self._queue

    @property
    def memory_bytes(self) -> float:
        """Memory that `close` gives back, estimated."""
        return _bytes(self._model, self._settings) if self._context else 0.0

    def add(self, job: EvaluationJob) -> None:
        self._queue.append(job)

    def cancel(self, request_id: int) -> None:
        for place, job in enumerate(self._queue):
            if job.id == request_id:
                del self._queue[place]
                if place == 0:
                    self._free()
                return

    def close(self) -> None:
        """Free the context. What is queued begins again in the next one: an answer is of one context."""
        self._free()
        for job in self._queue:
            job.begin_again(whole=True)

    def step(self, settings: EngineSettings, *, alone: bool) -> Iterator[Evaluated | Failed]:
        """Compute one piece, a smaller one where others wait for it; the job that ended with it."""
        if not self._queue:
            return
        job = self._queue[0]
        try:
            if self._context is None:
                self._open(job, settings)
            self._compute(job, min(job.pending, self._settings.ubatch if alone else PIECE_BESIDE))
        except RequestError as error:
            self._end()
            yield Failed(job.id, error.code, error.message, error.param)
            return
        if not job.pending:
            self._lib.llama_memory_seq_rm(self._memory, job.slot, -1, -1)
            job.computed = 0
            if len(job.rows) == len(job.request.inputs):
                self._end()
                yield self._answer(job)
            else:
                job.rows.append(Rows())

    def _open(self, job: EvaluationJob, settings: EngineSettings) -> None:
        """Raises RequestError where an input is too long, or the memory does not suffice."""
        room = min(settings.ctx_per_slot, total_cells(settings))
        if job.longest > room:
            message = f"an input has {job.longest} tokens, a slot holds {room}: shorten it or raise ctx_per_slot"
            raise RequestError("context_length_exceeded", "inputs", message)
        piece = min(PIECE, settings.ubatch)
        self._settings = replace(
            settings,
            **{"parallel": 1, "kv_unified": True, "kv_cells": 0, "batch": piece, "ubatch": piece},
            ctx_per_slot=job.longest + piece,
            kv_type_k=job.request.kv_types[0] if job.request.kv_types else settings.kv_type_k,
            kv_type_v=job.request.kv_types[1] if job.request.kv_types else settings.kv_type_v,
        )
        try:
            check_fits(self._model, self._settings, needed=_bytes(self._model, self._settings))
            self._context = new_context(self._model, self._settings, n_seq_max=1, n_outputs_max=piece)
        except DoesNotFit as error:
            raise RequestError("does_not_fit", None, f"no memory for an evaluation: {error}") from None
        self._interrupt.watch(self._context)
        self._memory = self._lib.llama_get_memory(self._context)
        self._batch = Batch(self._lib, piece)

    def _compute(self, job: EvaluationJob, count: int) -> None:
        """The next `count` tokens of the input at hand; none where the step was stopped. Raises RequestError."""
        self._batch.fill([(job, count)], output_from=job.start - 1)
        self._interrupt.mostly_for = job.id
        result = int(self._lib.llama_decode(self._context, self._batch.native))
        if result == DONE:
            for row in range(max(job.start - 1 - job.computed, 0), count):
                self._take(job, row)
            job.computed += count
        elif result == ABORTED:
            if not self._lib.llama_memory_seq_rm(self._memory, job.slot, job.computed, -1):
                self._lib.llama_memory_seq_rm(self._memory, job.slot, -1, -1)  # a recurrent state goes as a whole
                job.begin_again(whole=False)
        elif result < -1:
            raise DecodeFailed(f"llama_decode returned {result} for an evaluation")
        else:
            message = f"llama.cpp refused these inputs: llama_decode returned {result}"
            raise RequestError("internal", None, message)

    def _take(self, job: EvaluationJob, row: int) -> None:
        from llamaherd_server.worker import logits  # noqa: PLC0415 (numpy, 25 MiB that few need)

        values = logits.log_softmax(logits.row_of(self._model, self._context, row))
        best = logits.most_likely(values, job.request.top)
        rows, after = job.rows[-1], job.computed + row + 1
        rows.logprobs.append(float(values[job.tokens[after]]) if after < len(job.tokens) else float("nan"))
        rows.top_tokens += best.tobytes()
        rows.top_logprobs += values[best].tobytes()

    def _answer(self, job: EvaluationJob) -> Evaluated:
        tops = [array("i", bytes(rows.top_tokens)) for rows in job.rows]
        own = (one.tokens[one.start :] for one in job.request.inputs)
        tokens = sorted({*(token for some in (*tops, *own) for token in some)})
        evaluations = [
            Evaluation(rows.logprobs.tobytes(), bytes(rows.top_tokens), bytes(rows.top_logprobs)) for rows in job.rows
        ]
        return Evaluated(job.id, evaluations, dict(zip(tokens, self._model.pieces_of(tokens), strict=True)))

    def _end(self) -> None:
        self._queue.popleft()
        self._free()

    def _free(self) -> None:
        if self._context is not None:
            self._lib.llama_free(self._context)
            self._context = None


def _bytes(model: Model, settings: EngineSettings) -> float:
    """A context as any other, and logits for every token, in llama.cpp's buffer and in its output."""
    return context_bytes(model, settings) + 2 * 4 * settings.ubatch * model.n_vocab
