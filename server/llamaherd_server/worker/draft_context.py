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
from llamaherd_server.worker.speculation import SEEN, quartile

if TYPE_CHECKING:
    from llamaherd_server.worker.sequence import Sequence
    from llamaherd_server.worker.speculation import Wanted
    from llamaherd_server.worker.vocabulary import Vocabulary

# Pending tokens that a drafting pass computes itself: the last drafted token and the one sampled after it.
LAG = 2
# Fewest tokens worth a catch-up batch, and the size of the first one, when the time per token is not known yet.
LEAST_PIECE, FIRST_PIECE = 32, 128
FADES = 0.98  # decay of the time per token at each step without the budget for it, so that it is tried again later


@dataclass(eq=False, slots=True)
class _Followed:
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
        self._slots = [_Followed(slot) for slot in range(settings.parallel)]
        self._shares_cells = settings.kv_unified
        self._n_vocab, self._eog = min(model.n_vocab, target.n_vocab), target.eog_tokens
        self._narrow = model.n_vocab < target.n_vocab
        self._piece_s: deque[float] = deque(maxlen=SEEN)  # seconds per token of recent catch-up batches
        self._faded = 1.0

    def close(self) -> None:
        self._lib.llama_free(self._handle)

    def propose(self, wanted: list[Wanted], room: int, worth: float, budget_s: float) -> None:
        following: list[tuple[Sequence, _Followed]] = []
        for left, (sequence, most) in zip(range(len(wanted), 0, -1), wanted, strict=True):
            if (most := min(most, room // left)) > 0:
                room -= most
                following.append((sequence, self._follow(sequence, most)))
        self.catch_up_s = self._catch_up([one for _, one in following], budget_s)
        began = time.perf_counter()
        going = [one for _, one in following if 0 < one.pending <= LAG]
        while going:
            going = self._pass(going, worth)
        for sequence, one in following:
            sequence.draft = one.tokens[one.agreed :]
        self.drafting_s = time.perf_counter() - began

    def _follow(self, sequence: Sequence, most: int) -> _Followed:
        """Replace rejected drafted tokens with those that the sequence has now."""
        one = self._slots[sequence.slot]
        if one.arrival != sequence.arrival:
            self._adopt(one, sequence)
        agreed = one.agreed + common(one.tokens[one.agreed :], sequence.tokens[one.agreed :])
        new = sequence.tokens[agreed:]
        one.tokens[agreed:] = [min(token, self._n_vocab - 1) for token in new] if self._narrow else new
        self._cut(one, min(agreed, len(one.tokens) - 1))  # the last token's logits are needed
        one.agreed, one.most, one.chance = len(one.tokens), most, 1.0
        return one

    def _adopt(self, one: _Followed, sequence: Sequence) -> None:
        """Assign the slot to a new sequence, with the longest prefix of it that is in the cells."""
        others = self._slots if self._shares_cells else [one]
        shared, source = max(
            ((common(other.tokens[: other.computed], sequence.tokens), other) for other in others),
            key=lambda pair: (pair[0], pair[1] is one),
        )
        if source is not one:
            self._cut(one, 0)
            self._lib.llama_memory_seq_cp(self._memory, source.slot, one.slot, 0, shared)
            one.computed = shared
        one.arrival, one.tokens, one.agreed = sequence.arrival, source.tokens[:shared], shared

    def _catch_up(self, following: list[_Followed], budget_s: float) -> float:
        """Compute pending tokens, except each slot's last, within `budget_s`. Returns the estimated seconds spent."""
        behind = [one for one in following if one.pending > LAG]
        token_s = self._faded * quartile(self._piece_s) if self._piece_s else budget_s / FIRST_PIECE
        room = min(int(budget_s / token_s), self._capacity) if token_s else 0
        if not behind or room < min(LEAST_PIECE, sum(one.pending - 1 for one in behind)):
            self._faded *= FADES if behind else 1
            return 0.0
        shares = []
        for one in behind:
            if count := min(one.pending - 1, room):
                shares.append((one, count))
                room -= count
        began = time.perf_counter()
        computed = sum(count for _, count in self._decode(shares))
        self._lib.llama_synchronize(self._handle)
        self._piece_s.append((time.perf_counter() - began) / max(computed, 1))
        self._faded = 1.0
        return computed * quartile(self._piece_s)

    def _pass(self, going: list[_Followed], worth: float) -> list[_Followed]:
        """Draft one more token for each slot; return those that continue."""
        shares = self._decode([(one, one.pending) for one in going])
        ends = accumulate(count for _, count in shares)
        return [one for (one, _), end in zip(shares, ends, strict=True) if self._take(one, end - 1, worth)]

    def _take(self, one: _Followed, row: int, worth: float) -> bool:
        """Draft the most likely token if the draft's chance stays above `worth`; return whether to continue."""
        import numpy as np  # noqa: PLC0415 (25 MiB, needed only with a draft model)

        pointer = self._lib.llama_get_logits_ith(self._handle, row)
        logits = np.ctypeslib.as_array(pointer, shape=(self._model.n_vocab,))[: self._n_vocab]
        token = int(logits.argmax())
        one.chance /= float(np.exp(logits - logits[token]).sum())
        if one.chance < worth:
            return False
        one.tokens.append(token)
        return len(one.tokens) - one.agreed < one.most and token not in self._eog

    def _decode(self, shares: list[tuple[_Followed, int]]) -> list[tuple[_Followed, int]]:
        """Compute and return the shares that fit into the KV cells; raises DecodeFailed if the context is unusable."""
        while shares:
            self._batch.fill(shares)
            result = int(self._lib.llama_decode(self._handle, self._batch.native))
            if result == DONE:
                for one, count in shares:
                    one.computed += count
                return shares
            if result != NO_ROOM:
                raise DecodeFailed(f"llama_decode returned {result} for the draft model")
            wanted = [one for one, _ in shares]
            idle = [one for one in self._slots if one.computed and one not in wanted]
            for one in idle or [shares.pop()[0]]:
                self._cut(one, 0)
                one.arrival, one.tokens, one.agreed = -1, [], 0
        return []

    def _cut(self, one: _Followed, length: int) -> None:
        if length < one.computed:
            self._lib.llama_memory_seq_rm(self._memory, one.slot, length, -1)
            one.computed = length
