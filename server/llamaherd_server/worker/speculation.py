"""How far each sequence drafts: as far as that pays, by what drafts have given and by what steps have taken.

The unit of costs and savings is a token: the time in which a sequence gets one without drafts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from llamaherd_server.worker.drafts import Lookup

if TYPE_CHECKING:
    from llamaherd_server.worker.backend import Backend
    from llamaherd_server.worker.sequence import Drawn, Row, Sequence, Share

# What drafts may cost where none is confirmed, of each token; and how much of that all sequences together can save up.
ALLOWED, MOST_POOLED = 0.02, 8.0
# What a sequence's drafts have saved, as far as it counts: more of it would be lost when nothing is confirmed any more.
MOST_SAVED = 16.0
# Confirmed and refused drafts that a sequence is taken to have seen before its first; what of those seen counts after
# the next draft, and after the next token without one: what once failed is tried again.
HITS, MISSES, FADES, FADES_IDLE = 4.0, 1.0, 0.5, 0.98
# Step times remembered, and after how many steps of one kind the other kind's are too old.
SEEN, OLD = 16, 50
UNKNOWN_COST, LEAST_COST = 0.5, 0.01


class Drafter:
    """What may come next in one sequence, and how that has fared."""

    def __init__(self, limit: int) -> None:
        self.drafted = self.accepted = 0
        self.saved = 0.0
        self._lookup = Lookup(limit)
        self._hits = self._misses = 0.0

    def propose(self, tokens: list[int], most: int) -> list[int]:
        return self._lookup.propose(tokens, most) if most > 0 else []

    def depth(self, cost: float) -> int:
        """How many tokens to draft at most, where each costs `cost`: the next one's chance is above that."""
        self._hits, self._misses = FADES_IDLE * self._hits, FADES_IDLE * self._misses
        chance = (HITS + self._hits) / (HITS + MISSES + self._hits + self._misses)
        return int(math.log(cost) / math.log(chance)) if cost < 1 else 0

    def saw(self, drafted: int, accepted: int) -> None:
        self.drafted += drafted
        self.accepted += accepted
        self._hits = FADES * self._hits + accepted
        self._misses = FADES * self._misses + (accepted < drafted)


class StepTimes:
    """What a drafted token adds to a step. Other work on the host makes some steps longer: low quartiles count."""

    def __init__(self) -> None:
        self._plain: dict[int, deque[float]] = {}  # seconds of a step without drafts, by its sequences
        self._drafted: deque[float] = deque(maxlen=SEEN)  # seconds of a drafted token
        self._alike = 0  # steps of one kind

    @property
    def stale(self) -> bool:
        """Whether a step without drafts should be seen again."""
        return self._alike >= OLD

    def saw(self, sequences: int, drafted: int, seconds: float) -> None:
        if not drafted:
            self._plain.setdefault(sequences, deque(maxlen=SEEN)).append(seconds)
            self._alike = min(self._alike, 0) - 1
            if self._alike <= -OLD and self._drafted:  # what was too dear once may not be now
                self._drafted.popleft()
                self._alike = 0
        elif plain_s := self._plain_s(sequences):
            self._drafted.append(max(seconds - plain_s, 0.0) / drafted)
            self._alike = max(self._alike, 0) + 1

    def cost(self, sequences: int) -> float:
        """Of a drafted token beside so many sequences."""
        plain_s = self._plain_s(sequences)
        if not plain_s or not self._drafted:
            return UNKNOWN_COST
        return max(LEAST_COST, _quartile(self._drafted) * sequences / plain_s)

    def _plain_s(self, sequences: int) -> float:
        """Of so many sequences, or of a number near it; 0: unknown."""
        if not self._plain:
            return 0.0
        nearest = min(self._plain, key=lambda number: abs(number - sequences))
        more = _quartile(self._drafted) * (sequences - nearest) if self._drafted else 0.0
        return max(_quartile(self._plain[nearest]) + more, 0.0)


def draw(sample: Callable[[list[Row]], list[Drawn]], rows: list[Row]) -> list[list[Drawn]]:
    """The next tokens of each sequence: from its row, and while they are those of its draft from the rows after it.

    A token is sampled as it would be without the draft, so that nothing of its distribution changes.
    """
    drawn: list[list[Drawn]] = [[] for _ in rows]
    going = list(range(len(rows)))
    while going:
        tokens = sample([(rows[number][0], rows[number][1] + len(drawn[number])) for number in going])
        for number, token in zip(going, tokens, strict=True):
            drawn[number].append(token)
        going = [number for number in going if _comes_true(rows[number][0].draft, drawn[number])]
    return drawn


def _comes_true(draft: list[int], drawn: list[Drawn]) -> bool:
    return len(drawn) <= len(draft) and drawn[-1] == draft[len(drawn) - 1]


class Speculation:
    """Of one scheduler. `drafted` and `accepted` tokens since the start."""

    def __init__(self) -> None:
        self.drafted = self.accepted = 0
        self._pool = MOST_POOLED
        self._cost = UNKNOWN_COST

    def attach(self, backend: Backend) -> None:
        """Go on with another context."""
        self._settings = backend.settings
        self._times = StepTimes()
        self._on = backend.settings.speculative != "off" and backend.cuts
        self._room = min(backend.most_drafted, (backend.settings.ubatch - backend.settings.parallel) // 2)

    def draft(self, running: list[Sequence], free: int) -> None:
        """Give each that generates its draft; `free`: KV cells."""
        if not self._on:
            return
        self.drop(running)
        sequences = [sequence for sequence in running if sequence.decoding]
        self._cost = self._times.cost(len(sequences))
        self._pool = min(MOST_POOLED, self._pool + ALLOWED * len(sequences))
        if self._settings.speculative == "auto" and self._times.stale:
            return
        room = min(self._room, free - len(sequences))
        wanted = [(sequence, most) for sequence in sequences if (most := self._most(sequence)) > 0]
        for left, (sequence, most) in zip(range(len(wanted), 0, -1), wanted, strict=True):
            assert sequence.drafter  # noqa: S101 (`_most` has made it)
            sequence.draft = sequence.drafter.propose(sequence.tokens, min(most, room // left))
            room -= len(sequence.draft)

    def _most(self, sequence: Sequence) -> int:
        if sequence.sampler.can_be_late:
            return 0
        drafter = sequence.drafter = sequence.drafter or Drafter(sequence.limit)
        most = min(self._settings.speculative_depth, sequence.limit - len(sequence.tokens) - 1)
        if self._settings.speculative != "auto":
            return most
        affordable = int((drafter.saved + self._pool) / self._cost)
        return min(most, drafter.depth(self._cost), affordable)

    @staticmethod
    def drop(sequences: list[Sequence]) -> bool:
        """Take the drafts away; whether there were any."""
        drafting = [sequence for sequence in sequences if sequence.draft]
        for sequence in drafting:
            sequence.draft = []
        return bool(drafting)

    def timed(self, shares: list[Share], seconds: float) -> None:
        """A batch was computed."""
        if not self._on:
            return
        drafted = sum(len(sequence.draft) for sequence, _ in shares)
        if sum(count for _, count in shares) == len(shares) + drafted:  # there was no prompt in it
            self._times.saw(len(shares), drafted, seconds)
            self._cost = self._times.cost(len(shares))

    def verified(self, sequence: Sequence, accepted: int) -> None:
        """So many tokens of its draft came true."""
        drafted, sequence.draft = len(sequence.draft), []
        drafter = sequence.drafter
        if not drafted or drafter is None:
            return
        drafter.saw(drafted, accepted)
        self.drafted += drafted
        self.accepted += accepted
        saved = drafter.saved + accepted - drafted * self._cost
        drafter.saved = min(max(saved, 0.0), MOST_SAVED)
        self._pool = min(MOST_POOLED, self._pool + saved - drafter.saved)


def _quartile(values: deque[float]) -> float:
    return sorted(values)[len(values) // 4]
