"""Log probabilities of given tokens, from a context over the same weights that is freed at the end of each job.

Inputs are computed in bounded pieces between the steps of the generating context, whose KV cells stay untouched.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from msgspec.structs import replace

from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.wire.errors import RequestError
from llamaherd_server.wire.evaluation import Evaluate, Evaluated, Evaluation
from llamaherd_server.wire.protocol import Failed
from llamaherd_server.worker.interrupt import Interrupt
from llamaherd_server.worker.memory import total_cells
from llamaherd_server.worker.model import Model
from llamaherd_server.worker.side_context import SideContext

# Tokens per piece, the second beside running streams: few, because each row of logits is processed here.
PIECE_TOKENS, BUSY_PIECE_TOKENS = 128, 16


@dataclass(eq=False, slots=True)
class Rows:
    """The fields of an Evaluation, as far as they are computed."""

    logprobs: array[float] = field(default_factory=lambda: array("f"))
    top_tokens: bytearray = field(default_factory=bytearray)
    top_logprobs: bytearray = field(default_factory=bytearray)


@dataclass(eq=False, slots=True)
class EvaluationJob:
    """One Evaluate message and its answer so far. The first `computed` tokens of the current input are in the cells."""

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

    def restart(self, *, whole: bool) -> None:
        """Discard the results of the current input, or of the `whole` job."""
        self.computed = 0
        self.rows[-1 if not whole else 0 :] = [Rows()]


class Evaluator:
    """Computes queued jobs, one piece per `step`. Like the scheduler, it is for the step thread only."""

    def __init__(self, model: Model, interrupt: Interrupt) -> None:
        self._model = model
        self._context = SideContext(model, interrupt, "an evaluation")
        self._queue: deque[EvaluationJob] = deque()

    @property
    def idle(self) -> bool:
        return not self._queue

    @property
    def memory_bytes(self) -> float:
        """Estimated memory that `close` releases."""
        return self._context.memory_bytes

    def add(self, job: EvaluationJob) -> None:
        self._queue.append(job)

    def cancel(self, request_id: int) -> None:
        for index, job in enumerate(self._queue):
            if job.id == request_id:
                del self._queue[index]
                if index == 0:
                    self._context.close()
                return

    def close(self) -> None:
        """Free the context. Queued jobs start over, because an answer must not mix two contexts."""
        self._context.close()
        for job in self._queue:
            job.restart(whole=True)

    def step(self, settings: EngineSettings, *, alone: bool) -> Iterator[Evaluated | Failed]:
        """Compute one piece, a smaller one unless `alone`; yield the answer of the job that it finishes."""
        if not self._queue:
            return
        job = self._queue[0]
        try:
            if not self._context.handle:
                self._open(job, settings)
            self._compute(job, min(job.pending, self._context.settings.ubatch if alone else BUSY_PIECE_TOKENS))
        except RequestError as error:
            self._end()
            yield Failed(job.id, error.code, error.message, error.param)
            return
        if not job.pending:
            self._context.forget(job.slot)
            job.computed = 0
            if len(job.rows) == len(job.request.inputs):
                self._end()
                yield self._answer(job)
            else:
                job.rows.append(Rows())

    def _open(self, job: EvaluationJob, settings: EngineSettings) -> None:
        """Open the context. Raises RequestError if an input is too long or the context does not fit into memory."""
        room = min(settings.ctx_per_slot, total_cells(settings))
        if job.longest > room:
            message = f"an input has {job.longest} tokens, a slot holds {room}: shorten it or raise ctx_per_slot"
            raise RequestError("context_length_exceeded", "inputs", message)
        piece = min(PIECE_TOKENS, settings.ubatch)
        kinds = dict(zip(("kv_type_k", "kv_type_v"), job.request.kv_types or (), strict=False))
        self._context.open(replace(settings, **kinds), piece=piece, cells=job.longest + piece, n_seq_max=1)

    def _compute(self, job: EvaluationJob, count: int) -> None:
        """Compute the next `count` tokens of the current input, none if interrupted. Raises RequestError."""
        if self._context.decode([(job, count)], output_from=job.start - 1, mostly_for=job.id):
            for row in range(max(job.start - 1 - job.computed, 0), count):
                self._take(job, row)
            job.computed += count
        elif not self._context.forget(job.slot, job.computed):
            self._context.forget(job.slot)  # a recurrent state can only be dropped as a whole
            job.restart(whole=False)

    def _take(self, job: EvaluationJob, row: int) -> None:
        from llamaherd_server.worker import logits  # noqa: PLC0415 (numpy, 25 MiB, rarely needed)

        values = logits.log_softmax(logits.row_of(self._model, self._context.handle, row))
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
        self._context.close()
