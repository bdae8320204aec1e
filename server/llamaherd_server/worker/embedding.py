"""Embeddings and rerank scores: a context of their own over the same weights, made when one is first asked for.

It is computed in bounded pieces between the steps of the generating context, whose KV cells it never touches.
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

# Tokens that are computed at a time: rows of logits that llama.cpp has room for, and, the second, what a stream waits.
PIECE, PIECE_BESIDE = 128, 64
MOST_INPUTS = 64  # in one batch


@dataclass(eq=False, slots=True)
class Input:
    """One input of a job; `pooled` is what its first `computed` tokens give, not yet normalised."""

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
    """One Embed message and its answer so far: a vector for each input, empty while it is not known."""

    request: Embed
    inputs: list[list[int]]
    vectors: list[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.vectors = [b""] * len(self.inputs)

    @property
    def id(self) -> int:
        return self.request.id


class Embedder:
    """Jobs in, answers out, a piece at each `step`. Like the scheduler it belongs to the thread that computes.

    `causal`: no token looks at later ones, so that an input can be computed piece by piece; an encoder's cannot.
    """

    def __init__(self, model: Model, interrupt: Interrupt, *, causal: bool) -> None:
        self._model = model
        self._causal = causal
        self._lib = model.lib
        self._context = SideContext(model, interrupt, "embeddings")
        self._queue: deque[Input] = deque()
        self._slots = itertools.cycle(range(MOST_INPUTS))

    @property
    def idle(self) -> bool:
        return not self._queue

    @property
    def memory_bytes(self) -> float:
        """Memory that `close` gives back, estimated."""
        return self._context.memory_bytes

    def add(self, job: Job, settings: EngineSettings) -> None:
        """Raises RequestError where an input is too long for the context, or there is no memory for one."""
        self._check_room(job, settings)
        if not self._context.handle:
            self._open(settings)
        self._queue.extend(Input(job, index, tokens) for index, tokens in enumerate(job.inputs))

    def cancel(self, request_id: int) -> None:
        for one in [one for one in self._queue if one.job.id == request_id]:
            self._forget(one)
            self._queue.remove(one)

    def close(self) -> None:
        """Free the context. What is queued begins again in the next one."""
        for one in self._queue:
            self._forget(one)
        self._context.close()

    def step(self, settings: EngineSettings, *, alone: bool) -> Iterator[Embedded | Failed]:
        """Compute one piece, a smaller one where others wait for it; the jobs that ended with it."""
        if not self._queue:
            return
        if not self._context.handle:  # after a retune
            yield from self._reopen(settings)
            return
        shares = self._plan(self._context.settings.ubatch if alone or not self._causal else PIECE_BESIDE)
        try:
            computed = self._context.decode(shares, output_from=0, mostly_for=None)
        except RequestError as error:
            for job in {one.job for one, _ in shares}:
                yield self._fail(job, error)
            return
        for one, count in shares:
            if not computed:
                if not self._context.forget(one.slot, one.computed):
                    self._forget(one)  # a recurrent state goes as a whole
                continue
            self._pool(one, count)
            if not one.pending:
                self._forget(one)
                self._queue.remove(one)
                yield from self._finish(one)

    # --- the context ---------------------------------------------------------------------------------------------

    def _room(self, settings: EngineSettings) -> int:
        """The tokens that an input may have: a slot's; for an encoder at most those that it was trained with."""
        room = min(settings.ctx_per_slot, total_cells(settings))
        return room if self._causal else min(room, self._model.n_ctx_train)

    def _check_room(self, job: Job, settings: EngineSettings) -> None:
        longest, room = max(map(len, job.inputs)), self._room(settings)
        if longest > room:
            message = f"an input has {longest} tokens, the context for embeddings holds {room}: shorten it"
            raise RequestError("context_length_exceeded", "input", message)

    def _reopen(self, settings: EngineSettings) -> Iterator[Failed]:
        """With other settings; fails the jobs that they have no room for."""
        for job in {one.job for one in self._queue}:
            try:
                self._check_room(job, settings)
                if not self._context.handle:
                    self._open(settings)
            except RequestError as error:
                yield self._fail(job, error)

    def _open(self, settings: EngineSettings) -> None:
        """Raises RequestError where the memory does not suffice."""
        # An encoder looks at the whole input at once. Otherwise a piece begins where the last one ended.
        room = self._room(settings)
        piece = min(PIECE, settings.ubatch) if self._causal else room
        more = {"embeddings": True, "pooling_type": self._model.pooling, "n_seq_max": MOST_INPUTS}
        self._context.open(settings, piece=piece, cells=room + piece, **more)

    # --- one piece -----------------------------------------------------------------------------------------------

    def _plan(self, room: int) -> list[tuple[Input, int]]:
        """Inputs in their order, as far as `room` tokens go; only the last one may be cut, and an encoder's never."""
        room = min(room, self._context.settings.ubatch)
        shares: list[tuple[Input, int]] = []
        for one in itertools.islice(self._queue, MOST_INPUTS):
            count = min(one.pending, room)
            if count == 0 or (count < one.pending and not self._causal):
                break
            if one.slot == NO_SLOT:
                one.slot = next(self._slots)
            shares.append((one, count))
            room -= count
        return shares

    def _pool(self, one: Input, count: int) -> None:
        """Join what llama.cpp pooled over these `count` tokens to what the input's earlier tokens gave."""
        values = self._lib.llama_get_embeddings_seq(self._context.handle, one.slot)
        new = array("f", values[: self._model.n_pooled])
        before, one.computed = one.computed, one.computed + count
        if before and self._model.pooling == MEAN_POOLING:
            new = array("f", ((a * before + b * count) / one.computed for a, b in zip(one.pooled, new, strict=True)))
        one.pooled = new  # the last token's, or a score: nothing of the earlier ones is in it

    def _finish(self, one: Input) -> Iterator[Embedded]:
        job = one.job
        job.vectors[one.index] = (one.pooled if self._model.ranks else _normalised(one.pooled)).tobytes()
        if all(job.vectors):
            yield Embedded(job.id, job.vectors, sum(map(len, job.inputs)))

    def _forget(self, one: Input) -> None:
        if one.slot != NO_SLOT:
            self._context.forget(one.slot)
        one.slot, one.computed = NO_SLOT, 0

    def _fail(self, job: Job, error: RequestError) -> Failed:
        self.cancel(job.id)
        return Failed(job.id, error.code, error.message, error.param)


def _normalised(values: array[float]) -> array[float]:
    """Of length 1 (Euclidean), as llama-server's are; a null vector stays one."""
    norm = math.hypot(*values) or 1.0
    return array("f", (value / norm for value in values))
