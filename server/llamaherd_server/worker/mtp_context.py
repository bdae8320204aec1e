"""Drafting by the model's own head for the token after the next (MTP, also called NextN), in a context of its own.

The head guesses token p + 1 from token p and the model's state at p - 1; from then on, from its own guesses and states.
It therefore follows every step of the model. Source: draft-mtp in llama.cpp's common/speculative.cpp.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.worker import logits
from llamaherd_server.worker.backend import DONE, NO_ROOM
from llamaherd_server.worker.batch import Batch
from llamaherd_server.worker.weights import ModelError

if TYPE_CHECKING:
    from llamaherd_server.worker.model import Model
    from llamaherd_server.worker.sequence import Sequence, Share
    from llamaherd_server.worker.speculation import Wanted

# llama.cpp's interface for states is not part of llama.h yet: names of C++, which contain the types of the arguments.
_SWITCH = "_Z26llama_set_embeddings_nextnP13llama_contextbb"
_STATES = "_Z26llama_get_embeddings_nextnP13llama_context"
_STATE = "_Z30llama_get_embeddings_nextn_ithP13llama_contexti"


@dataclass(eq=False, slots=True)
class _Track:
    """The head's cells of a slot have its positions up to `end`, perhaps without the first ones.

    `states`: the model's states at the last positions before `followed`.
    """

    slot: int
    end: int = 0
    followed: int = 0
    states: Any = None

    def state(self, position: int) -> Any:
        """The model's state at a position; None if it is not known."""
        back = self.followed - position
        return self.states[-back] if self.states is not None and 0 < back <= len(self.states) else None


@dataclass(slots=True)
class _Guess:
    """A draft in progress: the next input of the head, and the chance that all tokens so far are accepted."""

    track: _Track
    token: int
    position: int
    state: Any
    most: int
    draft: list[int]
    chance: float = 1.0


class MtpContext:
    """Implements speculation.Source with the head's llama_context `handle`; `target` is the model's own context."""

    catch_up_s = 0.0

    def __init__(self, model: Model, handle: Any, target: Any, settings: EngineSettings, depth: int) -> None:
        self.drafting_s = 0.0
        self._model, self._lib, self._handle, self._target = model, model.lib, handle, target
        self._memory = self._lib.llama_get_memory(handle)
        self._kept = depth + 1
        self._tracks = [_Track(slot) for slot in range(settings.parallel + 1)]  # and of the spare sequence
        self._switch, self._states, self._state = _functions(self._lib._lib)
        self._width = int(self._lib.llama_model_n_embd_out(model.handle))
        self._switch(target, True, False)  # of all tokens, not only those with logits
        self._switch(handle, True, True)
        self._batch = Batch(self._lib, settings.batch)
        self._input = np.zeros((settings.batch, self._width), np.float32)  # a state beside each token
        self._batch.native.embd = self._input.ctypes.data_as(ctypes.POINTER(ctypes.c_float))

    def close(self) -> None:
        self._lib.llama_free(self._handle)

    def cut(self, slot: int, length: int = 0) -> None:
        """Drop what the head has of a slot from `length` on, as the model has."""
        track = self._tracks[slot]
        if track.end > length:
            self._lib.llama_memory_seq_rm(self._memory, slot, length, -1)
            track.end = length

    def share(self, source: int, target: int, length: int) -> None:
        """Copy what the head has of the first `length` positions of a slot to another one."""
        self.cut(target)
        of, to = self._tracks[source], self._tracks[target]
        if length <= of.end:
            self._lib.llama_memory_seq_cp(self._memory, source, target, 0, length)
            to.end, to.followed, to.states = length, of.followed, of.states

    def follow(self, shares: list[Share]) -> None:
        """Give the head what the model has just computed. If its cells do not suffice, drafts get worse."""
        total = sum(count for _, count in shares)
        states = np.ctypeslib.as_array(self._states(self._target), shape=(total, self._width))
        self._batch.fill(shares, outputs=False)
        row = 0
        for sequence, count in shares:
            start, end = sequence.computed, row + count
            track = self._at(sequence.slot, start)
            before = track.state(start - 1)
            self._input[row] = 0 if before is None else before
            self._input[row + 1 : end] = states[row : end - 1]
            track.end = track.followed = start + count
            track.states = states[max(row, end - self._kept) : end].copy()
            row = end
        slots = {sequence.slot for sequence, _ in shares}
        if not self._decode(slots):
            for slot in slots:
                self.cut(slot)

    def propose(self, wanted: list[Wanted], room: int, worth: float, budget_s: float) -> None:  # noqa: ARG002 (none)
        began = time.perf_counter()
        guesses: list[tuple[Sequence, _Guess]] = []
        for left, (sequence, most) in zip(range(len(wanted), 0, -1), wanted, strict=True):
            position = len(sequence.tokens) - 1
            track = self._at(sequence.slot, position)
            if (most := min(most, room // left)) > 0 and (state := track.state(position - 1)) is not None:
                room -= most
                guesses.append((sequence, _Guess(track, sequence.tokens[-1], position, state, most, sequence.draft)))
        active = [guess for _, guess in guesses]
        while active:
            active = self._pass(active, worth)
        for sequence, guess in guesses:  # `follow` replaces the head's states of these positions by the model's
            sequence.draft = guess.draft
            self.cut(guess.track.slot, len(sequence.tokens) - 1)
        self.drafting_s = time.perf_counter() - began

    def _pass(self, active: list[_Guess], worth: float) -> list[_Guess]:
        """Guess one more token for each; return those that continue."""
        self._batch.fill_rows((guess.token, guess.position, guess.track.slot) for guess in active)
        for row, guess in enumerate(active):
            self._input[row] = guess.state
            guess.track.end = guess.position + 1
        if not self._decode({guess.track.slot for guess in active}):
            return []
        return [guess for row, guess in enumerate(active) if self._take(guess, row, worth)]

    def _take(self, guess: _Guess, row: int, worth: float) -> bool:
        """Take the most likely token if the draft's chance stays above `worth`; return whether to continue."""
        token, probability = logits.likeliest(logits.row_of(self._model, self._handle, row))
        guess.chance *= probability
        if guess.chance < worth:
            return False
        guess.draft = [*guess.draft, token]
        guess.state = np.ctypeslib.as_array(self._state(self._handle, row), shape=(self._width,)).copy()
        guess.token, guess.position = token, guess.position + 1
        return len(guess.draft) < guess.most and token not in self._model.eog_tokens

    def _at(self, slot: int, length: int) -> _Track:
        """The slot's track, made to end at `length`: without all positions before if one of them is missing."""
        track = self._tracks[slot]
        if track.end < length:
            self.cut(slot)
            track.end, track.states = length, None
        self.cut(slot, length)
        return track

    def _decode(self, slots: set[int]) -> bool:
        """Compute the batch of these slots, if need be in place of what others have; returns whether it did."""
        result = int(self._lib.llama_decode(self._handle, self._batch.native))
        if result == NO_ROOM:
            for track in self._tracks:
                if track.slot not in slots:
                    self.cut(track.slot)
            result = int(self._lib.llama_decode(self._handle, self._batch.native))
        return result == DONE


def _functions(llama: ctypes.CDLL) -> tuple[Any, Any, Any]:
    """llama.cpp's functions for states. Raises ModelError."""
    try:
        switch, states, state = (llama[name] for name in (_SWITCH, _STATES, _STATE))
    except AttributeError:
        message = "this libllama has no interface for MTP heads: choose other drafts, or the engine llama-server"
        raise ModelError(message) from None
    switch.argtypes, switch.restype = [ctypes.c_void_p, ctypes.c_bool, ctypes.c_bool], None
    states.argtypes, states.restype = [ctypes.c_void_p], ctypes.POINTER(ctypes.c_float)
    state.argtypes, state.restype = [ctypes.c_void_p, ctypes.c_int32], ctypes.POINTER(ctypes.c_float)
    return switch, states, state
