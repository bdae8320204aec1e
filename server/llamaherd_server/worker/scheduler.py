"""The step loop: admit, plan, decode, sample, emit.

Each decoding sequence adds one token and its draft (speculation.py) to every step. Prompts fill the rest of one ubatch,
so that no long prompt stalls the others; while no sequence decodes, they may fill a whole batch. When KV cells run
short, cached prefixes are evicted first; then the latest sequence is preempted until there are cells again. When slots
run short, a preemptible sequence gives up its slot to one that is not preemptible.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate

from llamaherd_server.wire.errors import DecodeFailed, RequestError
from llamaherd_server.wire.protocol import Delta, Failed, Finished, FinishReason, Started, Stats, Step
from llamaherd_server.worker.backend import ABORTED, DONE, INVALID, NO_ROOM, Backend
from llamaherd_server.worker.keeper import Keeper
from llamaherd_server.worker.kv import KvCache
from llamaherd_server.worker.pieces import Found
from llamaherd_server.worker.placement import Place, find_place
from llamaherd_server.worker.prefix import best_source, is_coming
from llamaherd_server.worker.prompts import PromptCache
from llamaherd_server.worker.sequence import NO_SLOT, Drawn, Sequence, Share
from llamaherd_server.worker.speculation import Speculation, draw
from llamaherd_server.worker.stopwatch import Stopwatch

# Seconds that a step of prompts alone may take, estimated from earlier steps: the watchdog monitors completed steps.
MAX_PREFILL_STEP_S = 10.0
# How long a step waits for late grammars: a share of its decoding time, at least so many seconds, more if all are late.
GRAMMAR_WAIT_SHARE, GRAMMAR_WAIT_S, IDLE_GRAMMAR_WAIT_S = 0.1, 0.002, 0.02
MIN_PREFILL_TOKENS_FOR_ESTIMATE = 64  # tokens that a step must compute for its time per prompt token to be measured


class Scheduler:
    """Takes sequences; each `step` returns their events. Not thread-safe: the calling thread owns the context."""

    def __init__(
        self,
        backend: Backend,
        announce: Callable[[Started], None] | None = None,
        prompts: PromptCache | None = None,
    ) -> None:
        """`announce` gets Started before the prompt is computed; None: Started is among the step's events."""
        self._keeper = Keeper(prompts)
        self._speculation = Speculation()
        self._announce = announce or self._event
        self.waiting: list[Sequence] = []  # by turn
        self._events: list[Started | Delta | Finished | Failed] = []
        self._step = self._preemptions = self._slots_taken = self._cached = self._prompt = 0
        self._token_s = 0.0
        self._prompts_turn = False
        self.attach(backend)

    @property
    def running(self) -> list[Sequence]:
        """Sequences in a slot, in the order of the slots."""
        return [slot.sequence for slot in self._kv.slots if slot.sequence]

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    @property
    def settled(self) -> bool:
        """Whether there is nothing to compute, nor to store in the prompt cache."""
        return self.idle and self._keeper.unkept(self._kv) is None

    @property
    def only_prefilling(self) -> bool:
        """Whether all sequences are still at their prompts, and another one would get a slot."""
        sequences = [*self.running, *self.waiting]
        free = len(sequences) < self._backend.settings.parallel
        return free and bool(sequences) and not any(one.decoding or not one.pending for one in sequences)

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=lambda one: one.turn)

    def cancel(self, request_id: int) -> None:
        """End a request without further events; ignores one that has ended already."""
        for sequence in [*self.running, *self.waiting]:
            if sequence.request.id == request_id:
                self._release(sequence)

    def preempt_all(self, *, keep: bool) -> None:
        """Preempt all sequences until `attach`; `keep` saves their KV state, otherwise they are recomputed."""
        for sequence in self.running:
            self._preempt(sequence, keep=keep)
        if keep:
            self._keeper.keep_all(self._kv)
        else:
            for sequence in self.waiting:
                sequence.state = None

    def attach(self, backend: Backend) -> None:
        """Continue on another context."""
        self._backend = backend
        self._kv = KvCache(backend, self._keeper.keep)
        self._keeper.attach(backend)
        self._speculation.attach(backend)

    def step(self) -> Step:
        """Run one step: at most one new token for each sequence, and the accepted tokens of its draft."""
        watch = Stopwatch()
        self._step += 1
        self._admit()
        self._speculation.draft(self.running, self._kv.free)
        computed = 0
        for plan in self._plans():
            shares = self._with_room(plan)
            if shares and self._decode(shares, watch):
                computed += _tokens(shares)
                self._sample(shares, watch)
        self._take_late(watch)
        self._keeper.catch_up(self._kv)
        if computed >= MIN_PREFILL_TOKENS_FOR_ESTIMATE:
            self._token_s = watch.decode_s / computed
        events, self._events = self._events, []
        return Step(events, self._stats(computed, watch))

    def _event(self, event: Started) -> None:
        self._events.append(event)

    # --- admit ---------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Start waiting sequences by turn; one whose prefix is just being computed waits and lets others pass."""
        for sequence in list(self.waiting):
            if not self._kv.idle and not self._take_slot(sequence):
                return
            source, length, stored = None, 0, None
            if sequence.request.cache_prompt and sequence.state is None:
                slots = [slot for slot in self._kv.slots if slot.scope == sequence.request.cache_scope]
                source, length = best_source(self._kv, slots, sequence.tokens)
                if is_coming(slots, sequence.tokens, length):
                    continue
                if stored := self._keeper.better(sequence, length, self._token_s):
                    source, length = None, 0
            place = find_place(self._kv, sequence, source, length, self._backend.least_shared)
            if place is None:
                return
            self.waiting.remove(sequence)
            self._start(sequence, place, stored)

    def _start(self, sequence: Sequence, place: Place, stored: Found | None) -> None:
        slot, length = place.target, place.length
        if slot.length > length or place.source is not slot:
            self._keeper.keep(slot)
        if place.source is slot:
            length = self._kv.cut(slot, length)
        else:
            self._kv.cut(slot)
            if place.source is not None:
                length = self._kv.share(place.source, slot, length)
        if sequence.state is not None:
            length = self._resume(sequence, place)
        elif stored is not None:
            length = self._keeper.load(self._kv, slot, stored)
        slot.sequence, slot.tokens, slot.scope = sequence, sequence.tokens, sequence.request.cache_scope
        slot.texts, sequence.slot, sequence.computed = sequence.texts, slot.number, length
        self._keeper.begin(slot, sequence)
        if not sequence.started:
            sequence.begin(length)
            self._cached += length
            self._prompt += sequence.n_prompt
            self._announce(Started(sequence.request.id, sequence.n_prompt, length))

    # --- plan ----------------------------------------------------------------------------------------------------

    def _plans(self) -> Iterator[Callable[[], list[Share]]]:
        """Yield a function for each of the step's batches that returns its shares.

        Split KV batches only adjacent slots, and only as many tokens as each of them has. Steps therefore alternate:
        one computes each prompt in a batch of its own, the next decodes all sequences, whose slots are then adjacent.
        """
        if self._backend.settings.kv_unified:
            yield lambda: [*(decoding := self._decoding()), *self._prompts(beside=_tokens(decoding))]
            return
        prompts = self._prompts(beside=0)
        self._prompts_turn = bool(prompts) and not (self._prompts_turn and self._decoding())
        if not self._prompts_turn:
            yield self._decoding
            return
        for share in prompts:
            yield partial(_unless_preempted, share)

    def _decoding(self) -> list[Share]:
        return [(sequence, 1 + len(sequence.draft)) for sequence in self.running if sequence.decoding]

    def _prompts(self, beside: int) -> list[Share]:
        """Shares of prompts, by turn, that fill the ubatch up beside `beside` decoded tokens.

        While no sequence decodes, further prompts are added if the batch holds them whole: requests that arrive
        together then start together, and none stalls at its second token while the others' prompts are computed.
        """
        settings = self._backend.settings
        room = min(max(settings.ubatch - beside, 1), settings.batch - beside)
        left = settings.batch - beside
        if not self._backend.stops:
            left = room
        elif self._token_s:
            left = max(room, min(left, int(MAX_PREFILL_STEP_S / self._token_s)))
        running = self.running
        together = not any(one.decoding for one in running)
        shares = []
        prompts = sorted((one for one in running if one.pending and not one.decoding), key=lambda one: one.turn)
        for sequence in prompts:
            if sequence.request.preemptible > prompts[0].request.preemptible:
                break
            whole = together and sequence.pending <= min(settings.ubatch, left)
            count = min(sequence.to_border, sequence.pending if whole else room)
            if count > 0:
                shares.append((sequence, count))
                room -= count
                left -= count
        return shares

    def _with_room(self, plan: Callable[[], list[Share]]) -> list[Share]:
        """Return the plan's shares after freeing the KV cells they need; planned again after each preemption."""
        shares = plan()
        while self._kv.free < _tokens(shares):
            if not self._speculation.drop(self.running):
                self._make_room()
            shares = plan()
        return shares

    def _make_room(self) -> None:
        if self._kv.evict():
            return
        running = self.running
        if len(running) == 1:
            raise DecodeFailed(f"one sequence of {len(running[0].tokens)} tokens does not fit into the KV cache")
        self._preempt(max(running, key=lambda one: one.turn))
        self._preemptions += 1

    # --- decode --------------------------------------------------------------------------------------------------

    def _decode(self, shares: list[Share], watch: Stopwatch) -> bool:
        """Compute the shares; returns whether they were computed. If not, the next step plans them again."""
        before_s = watch.decode_s
        with watch.decoding():
            result = self._backend.decode(shares)
        if result == DONE:
            self._speculation.timed(shares, watch.decode_s - before_s)
            for sequence, count in shares:
                self._kv.grow(self._kv.slots[sequence.slot], count)
                sequence.computed = min(sequence.computed + count, len(sequence.tokens))
                self._keeper.mark(self._kv.slots[sequence.slot], sequence)
        elif result == NO_ROOM:
            self._make_room()
        elif result == ABORTED:
            for sequence, _ in shares:
                slot = self._kv.slots[sequence.slot]
                held = self._backend.held(slot.number)
                self._kv.grow(slot, max(held - slot.length, 0))
                self._kv.cut(slot, min(held, len(sequence.tokens) - 1))  # logits are lost: recompute the last token
                sequence.computed = slot.length
        elif result == INVALID and len(shares) == 1:
            self._fail(shares[0][0], RequestError("internal", None, "llama.cpp refused this request's tokens"))
        elif result == INVALID:  # run each share alone, so that only the invalid one fails
            for share in shares:
                if self._decode([share], watch):
                    self._sample([share], watch)
            return False
        else:
            raise DecodeFailed(f"llama_decode returned {result}")
        return result == DONE

    # --- sample and emit -----------------------------------------------------------------------------------------

    def _sample(self, shares: list[Share], watch: Stopwatch) -> None:
        """Sample a token for each fully computed sequence, and verify its draft."""
        ends = accumulate(count for _, count in shares)
        ended = [(one, end) for (one, _), end in zip(shares, ends, strict=True) if not one.pending]
        rows = [(one, end - 1 - len(one.draft)) for one, end in ended]
        with watch.sampling():
            drawn = draw(self._backend.sample, rows)
        for (sequence, row), tokens in zip(rows, drawn, strict=True):
            self._take(sequence, row, tokens)

    def _take_late(self, watch: Stopwatch) -> None:
        """Take tokens that wait for a grammar. A slow grammar misses steps and delays others only slightly."""
        late = [sequence for sequence in self.running if not sequence.pending]
        if not late:
            return
        beside = max(GRAMMAR_WAIT_S, GRAMMAR_WAIT_SHARE * watch.decode_s)
        until = time.monotonic() + (beside if len(late) < len(self.running) else max(beside, IDLE_GRAMMAR_WAIT_S))
        for sequence in late:
            with watch.sampling():
                token = self._backend.late(sequence, max(0.0, until - time.monotonic()))
            self._take(sequence, None, [token])

    def _take(self, sequence: Sequence, row: int | None, tokens: list[Drawn]) -> None:
        slot = self._kv.slots[sequence.slot]
        self._speculation.verified(sequence, len(tokens) - 1)
        for at, token in enumerate(tokens):
            if slot.sequence is not sequence:  # ended by the previous token
                break
            if isinstance(token, RequestError):
                self._fail(sequence, token)
            elif token is not None:
                self._emit(sequence, None if row is None else row + at, token)
        sequence.computed = max(sequence.computed, len(sequence.tokens) - 1)
        if slot.length > sequence.computed:  # the rejected part of the draft
            self._kv.reject(slot, sequence.computed)

    def _emit(self, sequence: Sequence, row: int | None, token: int) -> None:
        sequence.append(token)
        if self._backend.is_eog(token):
            self._finish(sequence, "stop")
            return
        request = sequence.request
        logprobs = None if request.logprobs is None else [self._backend.logprob(sequence, row, token, request.logprobs)]
        text = sequence.text.feed(self._backend.piece(token, special=token in sequence.preserved))
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

    def _fail(self, sequence: Sequence, error: RequestError) -> None:
        self._events.append(Failed(sequence.request.id, error.code, error.message, error.param, error.details))
        self._release(sequence)

    # --- release and preempt -------------------------------------------------------------------------------------

    def _release(self, sequence: Sequence) -> None:
        """Remove the sequence; its cells stay for prompts that share the prefix."""
        sequence.sampler.close()
        if sequence.slot == NO_SLOT:
            self.waiting.remove(sequence)
        else:
            self._kv.slots[sequence.slot].vacate(self._step)

    def _take_slot(self, sequence: Sequence) -> bool:
        """Take the slot of the latest preemptible sequence, which resumes later; returns whether there was one."""
        running = [one for one in self.running if one.request.preemptible and one.pending]
        if sequence.request.preemptible or not running:
            return False
        last = max(running, key=lambda one: one.arrival)
        self._kv.slots[last.slot].vacate(self._step)
        last.slot, last.draft = NO_SLOT, []
        self.add(last)
        self._slots_taken += 1
        return True

    def _preempt(self, sequence: Sequence, *, keep: bool = True) -> None:
        """Take a sequence off its slot until it is resumed: from its saved state with `keep`, else recomputed."""
        slot = self._kv.slots[sequence.slot]
        sequence.state = self._backend.save(slot.number) if keep and sequence.computed else None
        self._kv.cut(slot)
        slot.sequence = None
        sequence.slot, sequence.draft = NO_SLOT, []
        self.add(sequence)

    def _resume(self, sequence: Sequence, place: Place) -> int:
        """Restore a preempted sequence's KV state; returns how many tokens it covers."""
        state, sequence.state = sequence.state, None
        if state is None or not self._backend.restore(place.target.number, state):
            return 0
        self._kv.grow(place.target, sequence.computed)
        return sequence.computed

    def _stats(self, batch_tokens: int, watch: Stopwatch) -> Stats:
        return Stats(
            step=self._step,
            slots_busy=len(self.running),
            waiting=len(self.waiting),
            parked=sum(sequence.started for sequence in self.waiting),
            kv_used=self._kv.used,
            kv_size=self._kv.size,
            batch_tokens=batch_tokens,
            decode_s=watch.decode_s,
            sample_s=watch.sample_s,
            overhead_s=watch.rest_s(),
            preemptions=self._preemptions,
            slots_taken=self._slots_taken,
            cached_tokens=self._cached,
            prompt_tokens=self._prompt,
            drafted_tokens=self._speculation.drafted,
            accepted_tokens=self._speculation.accepted,
            **self._keeper.stats(),
        )


def _unless_preempted(share: Share) -> list[Share]:
    return [] if share[0].slot == NO_SLOT else [share]


def _tokens(shares: list[Share]) -> int:
    return sum(count for _, count in shares)
