"""Embeddings and rerank scores, from a separate context over the same weights that is created on first use.

Inputs are computed in bounded pieces between the steps of the generating context, whose KV cells stay untouched.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.wire.errors import RequestError
from llamaherd_server.wire.protocol import Embed, Embedded, Failed
from llamaherd_server.worker.interrupt import Interrupt
from llamaherd_server.worker.memory import total_cells
from llamaherd_server.worker.model import MEAN_POOLING, Model
from llamaherd_server.worker.sequence import NO_SLOT
from llamaherd_server.worker.side_context import SideContext

# Tokens per piece: the first limits llama.cpp's buffer for logits, the second how long running streams wait.
PIECE_TOKENS, BUSY_PIECE_TOKENS = 128, 64
MAX_INPUTS = 64  # per batch


@dataclass(eq=False, slots=True)
class Input:
    """One input of a job. `pooled` is the vector of its first `computed` tokens, not yet normalised."""

    job: Job
    index: int
    tokens: list[int]
    slot: int = NO_SLOT
    computed: int = 0
    draft: list[int] = field(default_factory=list)
    pooled: array[float] = field(default_factory=lambda: array("f"))

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed


@dataclass(eq=False, slots=True)
class Job:
    """One Embed message and its answer so far: a vector for each input, empty until it is known."""

    request: Embed
    inputs: list[list[int]]
    vectors: list[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.vectors = [b""] * len(self.inputs)

    @property
    def id(self) -> int:
        return self.request.id


class Embedder:
    """Computes queued jobs, one piece per `step`. Like the scheduler, it is for the step thread only.

    `causal`: tokens attend only to earlier ones, so an input can be computed in pieces. An encoder's input cannot.
    """

    def __init__(self, model: Model, interrupt: Interrupt, *, causal: bool) -> None:
        self._model = model
        self._causal = causal
        self._lib = model.lib
        self._context = SideContext(model, interrupt, "embeddings")
        self._queue: deque[Input] = deque()
        self._slots = itertools.cycle(range(MAX_INPUTS))

    @property
    def idle(self) -> bool:
        return not self._queue

    @property
    def memory_bytes(self) -> float:
        """Estimated memory that `close` releases."""
        return self._context.memory_bytes

    def add(self, job: Job, settings: EngineSettings) -> None:
        """Queue a job. Raises RequestError if an input is too long or the context does not fit into memory."""
        self._check_room(job, settings)
        if not self._context.handle:
            self._open(settings)
        self._queue.extend(Input(job, index, tokens) for index, tokens in enumerate(job.inputs))

    def cancel(self, request_id: int) -> None:
        for item in [item for item in self._queue if item.job.id == request_id]:
            self._forget(item)
            self._queue.remove(item)

    def close(self) -> None:
        """Free the context. Queued inputs start over in the next one."""
        for item in self._queue:
            self._forget(item)
        self._context.close()

    def step(self, settings: EngineSettings, *, alone: bool) -> Iterator[Embedded | Failed]:
        """Compute one piece, a smaller one unless `alone`; yield the answers of the jobs that it finishes."""
        if not self._queue:
            return
        if not self._context.handle:  # after a reconfiguration
            yield from self._reopen(settings)
            return
        shares = self._plan(self._context.settings.ubatch if alone or not self._causal else BUSY_PIECE_TOKENS)
        try:
            computed = self._context.decode(shares, output_from=0, mostly_for=None)
        except RequestError as error:
            for job in {item.job for item, _ in shares}:
                yield self._fail(job, error)
            return
        for item, count in shares:
            if not computed:
                if not self._context.forget(item.slot, item.computed):
                    self._forget(item)  # a recurrent state can only be dropped as a whole
                continue
            self._pool(item, count)
            if not item.pending:
                self._forget(item)
                self._queue.remove(item)
                yield from self._finish(item)

    # --- the context ---------------------------------------------------------------------------------------------

    def _room(self, settings: EngineSettings) -> int:
        """The maximum length of an input: a slot's; for an encoder, at most its training context."""
        room = min(settings.ctx_per_slot, total_cells(settings))
        return room if self._causal else min(room, self._model.n_ctx_train)

    def _check_room(self, job: Job, settings: EngineSettings) -> None:
        longest, room = max(map(len, job.inputs)), self._room(settings)
        if longest > room:
            message = f"an input has {longest} tokens, the context for embeddings holds {room}: shorten it"
            raise RequestError("context_length_exceeded", "input", message)

    def _reopen(self, settings: EngineSettings) -> Iterator[Failed]:
        """Open the context with new settings; fail the jobs that do not fit into it."""
        for job in {item.job for item in self._queue}:
            try:
                self._check_room(job, settings)
                if not self._context.handle:
                    self._open(settings)
            except RequestError as error:
                yield self._fail(job, error)

    def _open(self, settings: EngineSettings) -> None:
        """Open the context. Raises RequestError if it does not fit into memory."""
        # An encoder needs the whole input in one batch; a causal model continues where the last piece ended.
        room = self._room(settings)
        piece = min(PIECE_TOKENS, settings.ubatch) if self._causal else room
        more = {"embeddings": True, "pooling_type": self._model.pooling, "n_seq_max": MAX_INPUTS}
        self._context.open(settings, piece=piece, cells=room + piece, **more)

    # --- one piece -----------------------------------------------------------------------------------------------

    def _plan(self, room: int) -> list[tuple[Input, int]]:
        """Inputs in queue order, up to `room` tokens. Only the last one may be split, and never an encoder's."""
        room = min(room, self._context.settings.ubatch)
        shares: list[tuple[Input, int]] = []
        for item in itertools.islice(self._queue, MAX_INPUTS):
            count = min(item.pending, room)
            if count == 0 or (count < item.pending and not self._causal):
                break
            if item.slot == NO_SLOT:
                item.slot = next(self._slots)
            shares.append((item, count))
            room -= count
        return shares

    def _pool(self, item: Input, count: int) -> None:
        """Combine llama.cpp's pooled vector of these `count` tokens with that of the input's earlier tokens."""
        values = self._lib.llama_get_embeddings_seq(self._context.handle, item.slot)
        new = array("f", values[: self._model.n_pooled])
        before, item.computed = item.computed, item.computed + count
        if before and self._model.pooling == MEAN_POOLING:
            new = array("f", ((a * before + b * count) / item.computed for a, b in zip(item.pooled, new, strict=True)))
        item.pooled = new  # the last token's vector, or a score, replaces the earlier one

    def _finish(self, item: Input) -> Iterator[Embedded]:
        job = item.job
        job.vectors[item.index] = (item.pooled if self._model.ranks else _normalised(item.pooled)).tobytes()
        if all(job.vectors):
            yield Embedded(job.id, job.vectors, sum(map(len, job.inputs)))

    def _forget(self, item: Input) -> None:
        if item.slot != NO_SLOT:
            self._context.forget(item.slot)
        item.slot, item.computed = NO_SLOT, 0

    def _fail(self, job: Job, error: RequestError) -> Failed:
        self.cancel(job.id)
        return Failed(job.id, error.code, error.message, error.param)


def _normalised(values: array[float]) -> array[float]:
    """Scale to Euclidean length 1, as llama-server does; a null vector stays unchanged."""
    norm = math.hypot(*values) or 1.0
    return array("f", (value / norm for value in values))
