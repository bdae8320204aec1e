"""Drafting with a draft model, in a separate context that follows the tokens of all running sequences.

Like llama.cpp's common/speculative.cpp, it drafts the most likely tokens and stops where it is unsure. Unlike
llama.cpp, it computes the next token of all sequences in one batch.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.wire.errors import DecodeFailed
from llamaherd_server.worker.backend import DONE, NO_ROOM
from llamaherd_server.worker.batch import Batch
from llamaherd_server.worker.draft_model import DraftModel
from llamaherd_server.worker.prefix import common
from llamaherd_server.worker.speculation import MAX_SAMPLES, quartile

if TYPE_CHECKING:
    from llamaherd_server.worker.sequence import Sequence
    from llamaherd_server.worker.speculation import Wanted
    from llamaherd_server.worker.vocabulary import Vocabulary

# Pending tokens that a drafting pass computes itself: the last drafted token and the one sampled after it.
MAX_PASS_TOKENS = 2
# Fewest tokens worth a catch-up batch, and the size of the first one, when the time per token is not known yet.
MIN_CATCH_UP_TOKENS, FIRST_CATCH_UP_TOKENS = 32, 128
CATCH_UP_DECAY = 0.98  # of the time per token, at each step without the budget for it, so that it is tried again later


@dataclass(eq=False, slots=True)
class _Mirror:
    """The draft model's state of a slot. The first `computed` of `tokens` are in its cells; those from `agreed` on are
    drafted, at most `most`, and all of them are accepted with probability `chance`. `arrival` identifies the sequence.
    """

    slot: int
    arrival: int = -1
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    agreed: int = 0
    most: int = 0
    chance: float = 1.0
    draft: list[int] = field(default_factory=list)  # always empty; Batch.fill reads it

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed


class DraftContext:
    """Implements speculation.Source with the llama_context `handle` of a draft model; `target` verifies the drafts."""

    def __init__(self, model: DraftModel, handle: Any, settings: EngineSettings, target: Vocabulary) -> None:
        self.catch_up_s = self.drafting_s = 0.0
        self._model, self._lib, self._handle = model, model.lib, handle
        self._memory = self._lib.llama_get_memory(handle)
        self._batch, self._capacity = Batch(self._lib, settings.batch), settings.batch
        self._slots = [_Mirror(slot) for slot in range(settings.parallel)]
        self._shares_cells = settings.kv_unified
        self._n_vocab, self._eog = min(model.n_vocab, target.n_vocab), target.eog_tokens
        self._smaller_vocabulary = model.n_vocab < target.n_vocab
        self._token_times: deque[float] = deque(maxlen=MAX_SAMPLES)  # seconds per token of recent catch-up batches
        self._decay = 1.0

    def close(self) -> None:
        self._lib.llama_free(self._handle)

    def propose(self, wanted: list[Wanted], room: int, worth: float, budget_s: float) -> None:
        following: list[tuple[Sequence, _Mirror]] = []
        for left, (sequence, most) in zip(range(len(wanted), 0, -1), wanted, strict=True):
            if (most := min(most, room // left)) > 0:
                room -= most
                following.append((sequence, self._sync(sequence, most)))
        self.catch_up_s = self._catch_up([mirror for _, mirror in following], budget_s)
        began = time.perf_counter()
        active = [mirror for _, mirror in following if 0 < mirror.pending <= MAX_PASS_TOKENS]
        while active:
            active = self._pass(active, worth)
        for sequence, mirror in following:
            sequence.draft = mirror.tokens[mirror.agreed :]
        self.drafting_s = time.perf_counter() - began

    def _sync(self, sequence: Sequence, most: int) -> _Mirror:
        """Replace rejected drafted tokens with those that the sequence has now."""
        mirror = self._slots[sequence.slot]
        if mirror.arrival != sequence.arrival:
            self._adopt(mirror, sequence)
        agreed = mirror.agreed + common(mirror.tokens[mirror.agreed :], sequence.tokens[mirror.agreed :])
        new = sequence.tokens[agreed:]
        mirror.tokens[agreed:] = [min(token, self._n_vocab - 1) for token in new] if self._smaller_vocabulary else new
        self._truncate(mirror, min(agreed, len(mirror.tokens) - 1))  # the last token's logits are needed
        mirror.agreed, mirror.most, mirror.chance = len(mirror.tokens), most, 1.0
        return mirror

    def _adopt(self, mirror: _Mirror, sequence: Sequence) -> None:
        """Assign the slot to a new sequence, with the longest prefix of it that is in the cells."""
        others = self._slots if self._shares_cells else [mirror]
        shared, source = max(
            ((common(other.tokens[: other.computed], sequence.tokens), other) for other in others),
            key=lambda pair: (pair[0], pair[1] is mirror),
        )
        if source is not mirror:
            self._truncate(mirror, 0)
            self._lib.llama_memory_seq_cp(self._memory, source.slot, mirror.slot, 0, shared)
            mirror.computed = shared
        mirror.arrival, mirror.tokens, mirror.agreed = sequence.arrival, source.tokens[:shared], shared

    def _catch_up(self, following: list[_Mirror], budget_s: float) -> float:
        """Compute pending tokens, except each slot's last, within `budget_s`. Returns the estimated seconds spent."""
        behind = [mirror for mirror in following if mirror.pending > MAX_PASS_TOKENS]
        token_s = self._decay * quartile(self._token_times) if self._token_times else budget_s / FIRST_CATCH_UP_TOKENS
        room = min(int(budget_s / token_s), self._capacity) if token_s else 0
        if not behind or room < min(MIN_CATCH_UP_TOKENS, sum(mirror.pending - 1 for mirror in behind)):
            self._decay *= CATCH_UP_DECAY if behind else 1
            return 0.0
        shares = []
        for mirror in behind:
            if count := min(mirror.pending - 1, room):
                shares.append((mirror, count))
                room -= count
        began = time.perf_counter()
        computed = sum(count for _, count in self._decode(shares))
        self._lib.llama_synchronize(self._handle)
        self._token_times.append((time.perf_counter() - began) / max(computed, 1))
        self._decay = 1.0
        return computed * quartile(self._token_times)

    def _pass(self, active: list[_Mirror], worth: float) -> list[_Mirror]:
        """Draft one more token for each slot; return those that continue."""
        shares = self._decode([(mirror, mirror.pending) for mirror in active])
        ends = accumulate(count for _, count in shares)
        return [mirror for (mirror, _), end in zip(shares, ends, strict=True) if self._take(mirror, end - 1, worth)]

    def _take(self, mirror: _Mirror, row: int, worth: float) -> bool:
        """Draft the most likely token if the draft's chance stays above `worth`; return whether to continue."""
        from llamaherd_server.worker import logits  # noqa: PLC0415 (numpy, 25 MiB, needed only with a draft model)

        token, probability = logits.likeliest(logits.row_of(self._model, self._handle, row)[: self._n_vocab])
        mirror.chance *= probability
        if mirror.chance < worth:
            return False
        mirror.tokens.append(token)
        return len(mirror.tokens) - mirror.agreed < mirror.most and token not in self._eog

    def _decode(self, shares: list[tuple[_Mirror, int]]) -> list[tuple[_Mirror, int]]:
        """Compute and return the shares that fit into the KV cells; raises DecodeFailed if the context is unusable."""
        while shares:
            self._batch.fill(shares)
            result = int(self._lib.llama_decode(self._handle, self._batch.native))
            if result == DONE:
                for mirror, count in shares:
                    mirror.computed += count
                return shares
            if result != NO_ROOM:
                raise DecodeFailed(f"llama_decode returned {result} for the draft model")
            wanted = [mirror for mirror, _ in shares]
            idle = [mirror for mirror in self._slots if mirror.computed and mirror not in wanted]
            for mirror in idle or [shares.pop()[0]]:
                self._truncate(mirror, 0)
                mirror.arrival, mirror.tokens, mirror.agreed = -1, [], 0
        return []

    def _truncate(self, mirror: _Mirror, length: int) -> None:
        if length < mirror.computed:
            self._lib.llama_memory_seq_rm(self._memory, mirror.slot, length, -1)
            mirror.computed = length
