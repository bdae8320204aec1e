"""The step loop: admit, plan, decode, sample, emit.

Running sequences put one token each into every batch; prompts fill the rest, at most one ubatch of it, so that no long
prompt stalls the others. With split KV llama.cpp cuts a batch into ubatches of equal sequence lengths, so decoding
sequences and prompts go in batches of their own there.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

from llamaherd_server.protocol import (
    Delta,
    EngineSettings,
    Failed,
    Finished,
    FinishReason,
    Started,
    Stats,
    Step,
    TokenLogprob,
)
from llamaherd_server.worker.prefix import WORTH_COPYING, Slot, being_computed, best_source
from llamaherd_server.worker.sequence import Sequence

DONE, NO_ROOM = 0, 1


class Backend(Protocol):
    """What the loop needs of a context; `size` is its KV cells."""

    settings: EngineSettings
    size: int

    def decode(self, shares: list[tuple[Sequence, int]]) -> int:
        """Compute the next tokens of each sequence, as many as its share; DONE, NO_ROOM, or fatal."""

    def sample(self, chain: Any, row: int) -> int:
        """The next token from batch row `row`."""

    def logprob(self, row: int, token: int, top: int) -> TokenLogprob: ...

    def piece(self, token: int) -> bytes: ...

    def is_eog(self, token: int) -> bool: ...

    def forget(self, slot: int, start: int = 0) -> None:
        """Drop a slot's cells from position `start` on."""

    def share(self, source: int, target: int, length: int) -> None:
        """Give the empty slot `target` the first `length` positions of `source`."""


class DecodeFailed(RuntimeError):
    """llama_decode failed in a way that leaves the context unusable."""


@dataclass(slots=True)
class _Times:
    """Where a step's time went, in seconds."""

    decode: float = 0.0
    sample: float = 0.0


class Scheduler:
    """Sequences in, one Step of events out at each turn."""

    def __init__(self, backend: Backend) -> None:
        self.waiting: deque[Sequence] = deque()
        self.slots: list[Slot] = []
        self._events: list[Started | Delta | Finished | Failed] = []
        self._step = self._preemptions = self._cached = self._prompt = 0
        self.attach(backend)

    def park_all(self) -> None:
        """Let go of the context: what runs is computed again in the next one, before what waits."""
        for sequence in sorted(self.running, key=lambda sequence: sequence.begun, reverse=True):
            self._park(sequence)

    def attach(self, backend: Backend) -> None:
        """Go on with another context."""
        self._backend = backend
        self._most_running = backend.settings.parallel
        self.slots = [Slot(number) for number in range(backend.settings.parallel)]

    @property
    def running(self) -> list[Sequence]:
        return [slot.sequence for slot in self.slots if slot.sequence]

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def cancel(self, request_id: int) -> None:
        for sequence in [*self.running, *self.waiting]:
            if sequence.request.id == request_id:
                self._release(sequence)

    def step(self) -> Step:
        """One turn: at most one token for each running sequence."""
        began = time.perf_counter()
        times = _Times()
        self._step += 1
        self._admit()
        batches = self._plan()
        for shares in batches:
            self._compute(shares, times)
        events, self._events = self._events, []
        overhead = time.perf_counter() - began - times.decode - times.sample
        return Step(events, self._stats(sum(share for shares in batches for _, share in shares), times, overhead))

    def _admit(self) -> None:
        """Give free slots to those that wait, unless what they need is just being computed for another one."""
        for sequence in list(self.waiting):
            free = [slot for slot in self.slots if slot.sequence is None]
            if not free or len(self.running) >= self._most_running:
                return
            source, length = best_source(self.slots, sequence)
            if being_computed(self.slots, sequence, length):
                continue
            self.waiting.remove(sequence)
            oldest = min(free, key=lambda slot: (bool(slot.resident), slot.used))
            # A source's own cells serve best where nothing of them is lost, or where some must be given up anyway.
            if source in free and source and (len(source.resident) == length or oldest.resident):
                self._place(sequence, source, source, length)
            elif self._backend.settings.kv_unified or length >= WORTH_COPYING:
                self._place(sequence, oldest, source, length)
            else:
                self._place(sequence, oldest, None, 0)

    def _place(self, sequence: Sequence, slot: Slot, source: Slot | None, length: int) -> None:
        if source is slot:
            self._backend.forget(slot.number, length)
        else:
            self._backend.forget(slot.number)
            if source:
                self._backend.share(source.number, slot.number, length)
        slot.resident = []
        slot.sequence = sequence
        sequence.slot = slot.number
        sequence.computed = length
        if not sequence.started:
            sequence.started = True
            sequence.cached = length
            self._cached += length
            self._prompt += sequence.n_prompt
            self._events.append(Started(sequence.request.id, sequence.n_prompt, length))

    def _plan(self) -> list[list[tuple[Sequence, int]]]:
        """The batches of this step: which sequences, and how many tokens of each."""
        settings = self._backend.settings
        decoding = [(sequence, 1) for sequence in self.running if sequence.pending == 1]
        room = max(settings.ubatch - len(decoding), 1)
        room = min(room, settings.batch - len(decoding)) if settings.kv_unified else room
        prompts = []
        for sequence in sorted(self.running, key=lambda sequence: sequence.begun):
            if sequence.pending > 1 and room > 0:
                share = min(sequence.pending, room)
                prompts.append((sequence, share))
                room -= share
        batches = [decoding + prompts] if settings.kv_unified else [decoding, prompts]
        return [batch for batch in batches if batch]

    def _compute(self, shares: list[tuple[Sequence, int]], times: _Times) -> None:
        began = time.perf_counter()
        result = self._backend.decode(shares)
        decoded = time.perf_counter()
        times.decode += decoded - began
        if result == NO_ROOM:
            self._make_room()  # nothing was computed: the next step plans anew
            return
        if result != DONE:
            raise DecodeFailed(f"llama_decode returned {result}")
        row = -1
        sampled = []
        for sequence, share in shares:
            row += share
            sequence.computed += share
            if sequence.pending == 0:
                sampled.append((sequence, row, self._backend.sample(sequence.sampler.chain, row)))
        times.sample += time.perf_counter() - decoded
        for sequence, row, token in sampled:
            self._emit(sequence, row, token)

    def _make_room(self) -> None:
        """Give up cells that only cache; then park the sequence that came last, until another one ends."""
        cached = [slot for slot in self.slots if slot.resident]
        for slot in cached:
            self._backend.forget(slot.number)
            slot.resident = []
        if cached:
            return
        if len(self.running) == 1:
            raise DecodeFailed("one sequence alone does not fit into the KV cache")
        self._park(max(self.running, key=lambda sequence: sequence.begun))
        self._most_running = len(self.running)

    def _emit(self, sequence: Sequence, row: int, token: int) -> None:
        sequence.first = sequence.first or time.perf_counter()
        sequence.tokens.append(token)
        if self._backend.is_eog(token):
            self._finish(sequence, "stop")
            return
        request = sequence.request
        logprobs = None if request.logprobs is None else [self._backend.logprob(row, token, request.logprobs)]
        text = sequence.text.feed(self._backend.piece(token))
        self._events.append(Delta(id=request.id, text=text, n_tokens=1, logprobs=logprobs))
        if sequence.text.stop is not None:
            self._finish(sequence, "stop")
        elif len(sequence.tokens) >= sequence.limit:
            self._finish(sequence, "length")

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if rest := sequence.text.finish():
            self._events.append(Delta(id=sequence.request.id, text=rest, n_tokens=0))
        self._events.append(sequence.finished(reason))
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        sequence.sampler.close()
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            return
        slot = self.slots[sequence.slot]
        slot.resident = slot.cells
        slot.sequence = None
        slot.used = self._step
        self._most_running = min(self._most_running + 1, len(self.slots))

    def _park(self, sequence: Sequence) -> None:
        """Back to the front of the queue; its tokens are kept, its cells are computed again later."""
        self._backend.forget(sequence.slot)
        self.slots[sequence.slot].sequence = None
        sequence.computed = 0
        self._preemptions += 1
        self.waiting.appendleft(sequence)

    def _stats(self, batch_tokens: int, times: _Times, overhead_s: float) -> Stats:
        return Stats(
            step=self._step,
            slots_busy=len(self.running),
            waiting=len(self.waiting),
            parked=sum(sequence.started for sequence in self.waiting),
            kv_used=min(self._backend.size, sum(len(slot.cells) for slot in self.slots)),
            kv_size=self._backend.size,
            batch_tokens=batch_tokens,
            decode_s=times.decode,
            sample_s=times.sample,
            overhead_s=overhead_s,
            preemptions=self._preemptions,
            cached_tokens=self._cached,
            prompt_tokens=self._prompt,
        )
