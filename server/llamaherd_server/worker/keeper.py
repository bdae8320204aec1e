"""Prompt cache policy: when to store computed prompts and to load them, and where to make checkpoints."""

from __future__ import annotations

import time
from functools import partial

from llamaherd_server.worker.backend import Backend
from llamaherd_server.worker.kv import KvCache, Slot
from llamaherd_server.worker.pieces import Found
from llamaherd_server.worker.prompts import MIN_TOKENS, PromptCache
from llamaherd_server.worker.sequence import Sequence

# Most checkpoints per slot and bytes of all checkpoints; fewest tokens between borders, and between other checkpoints.
MAX_CHECKPOINTS, MAX_CHECKPOINT_BYTES, MIN_BORDER_GAP, MIN_CHECKPOINT_GAP = 8, 2**29, 64, 256
# Load rate in bytes per second that is assumed until one has been measured.
INITIAL_BYTES_PER_S = 2e9
_WEIGHT = 0.3  # of the latest load in the average rate


class Keeper:
    """The policy of one scheduler. Without `prompts` it only makes checkpoints."""

    def __init__(self, prompts: PromptCache | None) -> None:
        self._prompts = prompts
        self._bytes_per_s = INITIAL_BYTES_PER_S
        self._memory_tokens = self._disk_tokens = 0

    def attach(self, backend: Backend) -> None:
        self._backend = backend
        self._checkpoint_bytes = MAX_CHECKPOINT_BYTES // backend.settings.parallel
        if self._prompts:
            self._prompts.suit(backend.settings, cuts=backend.cuts)

    def begin(self, slot: Slot, sequence: Sequence) -> None:
        """Make a checkpoint where the sequence leaves its cached prefix; space out borders, since each costs a step."""
        sequence.space_borders(MIN_BORDER_GAP)
        self.mark(slot, sequence, border=sequence.computed > 0)

    def mark(self, slot: Slot, sequence: Sequence, *, border: bool = False) -> None:
        """If a slot cannot be truncated, make a checkpoint at its prompt's borders and end, or far from the last."""
        length, checkpoints = sequence.computed, slot.checkpoints
        if self._backend.cuts or length > sequence.n_prompt:
            return
        last = checkpoints[-1][0] if checkpoints else 0
        border = border or length in sequence.borders or length == sequence.n_prompt
        if length <= last or (not border and length - last < MIN_CHECKPOINT_GAP):
            return
        state = self._backend.checkpoint(slot.number)
        if len(state) > self._checkpoint_bytes:
            return
        checkpoints.append((length, state))
        while len(checkpoints) > MAX_CHECKPOINTS or sum(len(one) for _, one in checkpoints) > self._checkpoint_bytes:
            # the first one usually ends the system prompt, and the next turn starts from one of the last
            gaps = [checkpoints[i + 1][0] - checkpoints[i - 1][0] for i in range(1, len(checkpoints) - 2)]
            del checkpoints[1 + gaps.index(min(gaps)) if gaps else 0]

    def keep(self, slot: Slot) -> None:
        """Store the slot's computed tokens in the prompt cache, unless they are there already."""
        if self._prompts is None or slot.kept >= slot.length:
            return
        slot.kept = slot.length
        tokens = slot.tokens[: slot.length]
        after = self._prompts.lacks(slot.scope, tokens, chained=self._backend.chains)
        if after is not None:
            save = partial(self._backend.save_part, slot.number, after[1])
            self._prompts.put(slot.scope, tokens, after, slot.checkpoints, save, texts=slot.texts)

    def unkept(self, kv: KvCache) -> Slot | None:
        """The slot with tokens to store that has been idle longest."""
        if self._prompts is None:
            return None
        return min((one for one in kv.idle if one.kept < one.length), key=lambda slot: slot.used, default=None)

    def catch_up(self, kv: KvCache) -> None:
        """Store at most one slot, because running sequences wait meanwhile."""
        if slot := self.unkept(kv):
            self.keep(slot)

    def keep_all(self, kv: KvCache) -> None:
        while slot := self.unkept(kv):
            self.keep(slot)

    def better(self, sequence: Sequence, length: int, token_s: float) -> Found | None:
        """A cached prefix longer than the `length` tokens in a slot, if loading it is faster than computing the rest.

        `token_s`: seconds to compute a prompt token; 0: unknown.
        """
        if self._prompts is None:
            return None
        found = self._prompts.find(sequence.request.cache_scope, sequence.tokens)
        if found is None or found.length < length + MIN_TOKENS:
            return None
        slower = token_s and found.size / self._bytes_per_s > (found.length - length) * token_s
        return None if slower else found

    def load(self, kv: KvCache, slot: Slot, found: Found) -> int:
        """Load a cached prefix into the empty slot. Returns its length in tokens, 0 on failure."""
        assert self._prompts is not None  # noqa: S101 (`found` comes from it)
        began = time.perf_counter()
        fetched = found.fetched
        with self._prompts.held(found) as (parts, back, checkpoints):
            if not kv.load(slot, parts, back, checkpoints):
                return 0
        rate = found.size / max(time.perf_counter() - began, 1e-6)
        self._bytes_per_s += _WEIGHT * (rate - self._bytes_per_s)
        if fetched:
            self._disk_tokens += found.length
        else:
            self._memory_tokens += found.length
        return found.length

    def stats(self) -> dict[str, int]:
        prompts = self._prompts
        return {
            "cached_memory_tokens": self._memory_tokens,
            "cached_disk_tokens": self._disk_tokens,
            "prompt_evictions": prompts.evictions if prompts else 0,
            "prompt_bytes": prompts.arena.used if prompts else 0,
            "prompt_limit_bytes": prompts.arena.size if prompts else 0,
        }
