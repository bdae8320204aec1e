"""A context that computes nothing and keeps its own account of cells, as llama.cpp would."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from msgspec.structs import asdict

from llamaherd_server.gguf import drafted
from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.wire.errors import RequestError
from llamaherd_server.wire.protocol import Generate, TokenLogprob
from llamaherd_server.wire.text import TextStream
from llamaherd_server.worker.backend import ABORTED, DONE, INVALID, NO_ROOM, Part
from llamaherd_server.worker.samplers import Draw
from llamaherd_server.worker.sequence import Drawn, Row, Sequence, Share
from llamaherd_server.worker.speculation import Source, Wanted

EOG = 3


def next_token(tokens: list[int]) -> int:
    """Mostly what the last three say, so that drafts come true as often as not."""
    if sum(tokens) % 11 == 0:
        return EOG
    return 2 if sum(tokens[-3:]) % 2 or len(tokens) % 7 == 0 else 1


class FakeSampler:
    closed = looks = 0
    logits = None
    top_logits = 0
    changed = ()
    can_be_late = False

    def sample(self, draw: Draw) -> int | None:
        raise AssertionError("the fake context samples")

    def late(self, wait_s: float) -> int | None:
        raise AssertionError("the fake context samples")

    def force(self, token: int) -> None:
        raise AssertionError("the fake context samples")

    def close(self) -> None:
        self.closed += 1


class Cell:
    """One token's keys and values."""

    def __init__(self, token: int) -> None:
        self.token = token


class FakeDrafts:
    """Implements speculation.Source by what the model says if nothing ends it; the last token is wrong at times."""

    catch_up_s = drafting_s = 0.0

    def propose(self, wanted: list[Wanted], room: int, worth: float, budget_s: float) -> None:
        for one, most in wanted:
            for _ in range(min(most, room)):
                one.draft.append(2 if len(one.draft) % 3 or not sum(one.tokens) % 2 else 1)
            room -= len(one.draft)


class FakeContext:
    """Implements scheduler.Backend.

    `poison` are requests that llama_decode refuses, `unsampled` those whose sampler fails, `late_for` those whose
    tokens come at every so many looks, `aborts` the calls of decode that end half way, `forgetful` a context that
    cannot take saved cells; `ends` one whose model says `next_token`, and ends some outputs by itself.
    """

    def __init__(
        self,
        settings: EngineSettings,
        cells: int,
        *,
        poison: frozenset[int] = frozenset(),
        unsampled: frozenset[int] = frozenset(),
        late_for: dict[int, int] | None = None,
        aborts: frozenset[int] = frozenset(),
        forgetful: bool = False,
        ends: bool = False,
    ) -> None:
        self.settings = settings
        self.most_drafted = drafted(asdict(settings))
        self.draft_depth = settings.speculative_depth if self.most_drafted else 0
        self.drafts: Source | None = FakeDrafts() if settings.speculative == "draft" else None
        self.size = cells if settings.kv_unified else cells * settings.parallel
        self.least_shared = 1 if settings.kv_unified else 4
        self.cuts = True
        self.chains = settings.kv_unified
        self.stops = True
        self._overshot: set[int] = set()  # slots whose recurrent state is ahead of their cells
        self.slots: dict[int, list[Cell]] = {slot: [] for slot in range(settings.parallel)}
        self.batches: list[list[Share]] = []
        self.calls = 0
        self._per_slot = cells
        self._poison = poison
        self._unsampled = unsampled
        self._late_for = late_for or {}
        self._aborts = aborts
        self._forgetful = forgetful
        self._ends = ends

    @property
    def used(self) -> int:
        return len({cell for cells in self.slots.values() for cell in cells})

    def decode(self, shares: list[Share]) -> int:
        self.calls += 1
        new = sum(count for _, count in shares)
        assert 0 < new <= self.settings.batch
        assert len({sequence.slot for sequence, _ in shares}) == len(shares)
        if any(sequence.request.id in self._poison for sequence, _ in shares):
            return INVALID
        if self.used + new > self.size:
            return NO_ROOM
        aborted = self.stops and self.calls in self._aborts
        left = self.calls % (new + 1) if aborted else new
        for sequence, count in shares:
            assert sequence.slot not in self._overshot
            cells = self.slots[sequence.slot]
            held = [cell.token for cell in cells]
            assert held == sequence.tokens[: sequence.computed], "the cells are not what the scheduler thinks"
            end = sequence.computed + min(count, left)
            known = [*sequence.tokens, *sequence.draft]
            assert sequence.computed + count <= len(known)
            assert not sequence.draft or sequence.computed + count == len(known)
            cells += [Cell(token) for token in known[sequence.computed : end]]
            left -= min(count, left)
            assert self.settings.kv_unified or len(cells) <= self._per_slot
        if aborted:
            return ABORTED
        self.batches.append(list(shares))
        return DONE

    def held(self, slot: int) -> int:
        if self._forgetful:
            self.slots[slot].clear()
        return len(self.slots[slot])

    def sample(self, rows: list[Row]) -> list[Drawn]:
        assert len({sequence.slot for sequence, _ in rows}) == len(rows)
        return [self._token(sequence, row) for sequence, row in rows]

    def _token(self, sequence: Sequence, row: int) -> Drawn:
        of_rows = [one for one, count in self.batches[-1] for _ in range(count)]
        assert of_rows[row] is sequence
        last = len(of_rows) - 1 - of_rows[::-1].index(sequence)
        known = [*sequence.tokens, *sequence.draft[: len(sequence.draft) - (last - row)]]
        assert sequence.draft[: len(known) - len(sequence.tokens)] == known[len(sequence.tokens) :]
        assert sequence.pending == 0
        if sequence.request.id in self._unsampled:
            return RequestError("invalid_grammar", "grammar", "dead end")
        if sequence.id in self._late_for:
            assert not sequence.draft
            return None
        return next_token(known) if self._ends else 2

    def late(self, sequence: Sequence, wait_s: float) -> Drawn:
        assert sequence.pending == 0
        assert isinstance(sequence.sampler, FakeSampler)
        sequence.sampler.looks += 1
        return 2 if sequence.sampler.looks % self._late_for[sequence.id] == 0 else None

    def logprob(self, sequence: Sequence, row: int | None, token: int, top: int) -> TokenLogprob:
        raise AssertionError("nobody asked")

    def piece(self, token: int, *, special: bool = False) -> bytes:
        return b"x"

    def is_eog(self, token: int) -> bool:
        return token == EOG

    def forget(self, slot: int, start: int = 0) -> None:
        assert self.cuts or start == 0 or start >= len(self.slots[slot])
        self._overshot.discard(slot)
        del self.slots[slot][start:]

    def reject(self, slot: int, length: int) -> None:
        (added,) = [count for one, count in self.batches[-1] if one.slot == slot]
        assert 0 < len(self.slots[slot]) - length < added
        del self.slots[slot][length:]

    def share(self, source: int, target: int, length: int) -> None:
        assert self.slots[target] == []
        cells = self.slots[source][:length]
        if not self.cuts and length < len(self.slots[source]):
            self._overshot.add(target)
        self.slots[target] = cells if self.settings.kv_unified else [Cell(cell.token) for cell in cells]

    def save(self, slot: int) -> bytes:
        return bytes(cell.token for cell in self.slots[slot])

    def restore(self, slot: int, state: bytes) -> bool:
        assert self.slots[slot] == []
        if self._forgetful:
            return False
        self.slots[slot] = [Cell(token) for token in state]
        return True

    def save_part(self, slot: int, start: int, buffer: Callable[[int], Any]) -> int:
        assert self.chains or start == 0
        state = self.save(slot)[start:]
        if (into := buffer(len(state))) is None:
            return 0
        into[:] = state
        return len(state)

    def load_parts(self, slot: int, parts: list[Part], back: bytes | None) -> bool:
        assert self.slots[slot] == []
        if self._forgetful:
            return False
        tokens: list[int] = []
        for state, size, end in parts:
            assert size == len(state)
            tokens = [*tokens, *bytes(state)]
            assert len(tokens) >= end
            overshot = len(tokens) > end
            del tokens[end:]
        self.slots[slot] = [Cell(token) for token in tokens]
        if back is not None:
            return self.rewind(slot, parts[-1][2], back)
        assert self.cuts or not overshot
        return True

    def keeps(self, slot: int, length: int) -> bool:
        return self.cuts or len(self.slots[slot]) == length

    def checkpoint(self, slot: int) -> bytes:
        return self.save(slot)

    def rewind(self, slot: int, length: int, state: bytes) -> bool:
        assert self.save(slot)[:length] == state
        self._overshot.discard(slot)
        if self._forgetful:
            self.slots[slot] = []
            return False
        del self.slots[slot][length:]
        return True


def sequence(number: int, prompt: list[int], new: int, late: Collection[int] = ()) -> Sequence:
    request = Generate(id=number, prompt=prompt, max_tokens=new)
    sampler = FakeSampler()
    sampler.can_be_late = number in late
    return Sequence(request, list(prompt), sampler, TextStream([]), limit=len(prompt) + new)
