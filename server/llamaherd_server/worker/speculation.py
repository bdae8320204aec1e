"""How far each sequence drafts: as far as that pays, by what drafts have given and by what steps have taken.

The unit of costs and savings is a token: the time in which a sequence gets one without drafts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeAlias

from llamaherd_server.worker.drafts import Lookup

if TYPE_CHECKING:
    from llamaherd_server.worker.backend import Backend
    from llamaherd_server.worker.sequence import Drawn, Row, Sequence, Share

# What drafts may cost where none is confirmed, of each token; and how much of that all sequences together can save up.
# A draft model gets more, which it alone may use to read prompts: before that it says nothing.
ALLOWED, MOST_POOLED, MOST_POOLED_MODEL = 0.02, 8.0, 32.0
# What a sequence's drafts have saved, as far as it counts: more of it would be lost when nothing is confirmed any more.
MOST_SAVED = 16.0
# Confirmed and refused drafts that a sequence is taken to have seen before its first; what of those seen counts after
# the next draft, and after the next token without one: what once failed is tried again.
HITS, MISSES, FADES, FADES_IDLE = 4.0, 1.0, 0.5, 0.98
# Step times remembered, how few of drafts do not show yet that these are dear, and after how many steps of one kind the
# other kind's are too old.
SEEN, FEW, OLD = 16, 3, 50
UNKNOWN_COST, LEAST_COST = 0.5, 0.01


class Drafter:
    """How the drafts of one sequence have fared. `lookup`: of its own text, where that drafts."""

    def __init__(self) -> None:
        self.drafted = self.accepted = 0
        self.saved = 0.0
        self.lookup: Lookup | None = None
        self._hits = self._misses = 0.0

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


class Source(Protocol):
    """Where drafts come from. `catch_up_s`, `drafting_s`: what the last call took before it drafted, and to draft."""

    catch_up_s: float
    drafting_s: float

    def propose(self, wanted: list[Wanted], room: int, worth: float, budget_s: float) -> None:
        """Give each its draft, `room` tokens in all.

        A token that comes true with a chance below `worth` costs more than it saves; `budget_s` seconds may go into
        what no draft comes from yet.
        """


class Lookups:
    """Implements Source by what a sequence's text repeats."""

    catch_up_s = drafting_s = 0.0

    def propose(self, wanted: list[Wanted], room: int, worth: float, budget_s: float) -> None:  # noqa: ARG002 (free)
        for left, (sequence, most) in zip(range(len(wanted), 0, -1), wanted, strict=True):
            drafter = sequence.drafter
            assert drafter  # noqa: S101 (`Speculation` has made it)
            if (most := min(most, room // left)) > 0:
                drafter.lookup = drafter.lookup or Lookup(sequence.limit)
                sequence.draft = drafter.lookup.propose(sequence.tokens, most)
                room -= len(sequence.draft)


class StepTimes:
    """What a drafted token adds to a step. Other work on the host makes some steps longer: low quartiles count."""

    def __init__(self) -> None:
        self._plain: dict[int, deque[float]] = {}  # seconds of a step without drafts, by its sequences
        self._drafted: deque[float] = deque(maxlen=SEEN)  # seconds of a drafted token, within a step
        self._drafting: deque[float] = deque(maxlen=SEEN)  # and before it, to draft it
        self._alike = 0  # steps of one kind

    @property
    def stale(self) -> bool:
        """Whether a step without drafts should be seen again."""
        return self._alike >= OLD

    def saw(self, sequences: int, drafted: int, seconds: float, drafting_s: float = 0.0) -> None:
        if not drafted:
            self._plain.setdefault(sequences, deque(maxlen=SEEN)).append(seconds)
            self._alike = min(self._alike, 0) - 1
            if self._alike <= -OLD and self._drafted:  # what was too dear once may not be now
                self._drafted.popleft()
                self._drafting.popleft()
                self._alike = 0
        elif plain_s := self._plain_s(sequences):
            self._drafted.append(max(seconds - plain_s, 0.0) / drafted)
            self._drafting.append(drafting_s / drafted)
            self._alike = max(self._alike, 0) + 1

    def cost(self, sequences: int) -> float:
        """Of a drafted token beside so many sequences."""
        token_s = self.token_s(sequences)
        drafting = quartile(self._drafting) / token_s if token_s and self._drafting else 0.0
        cost = self.step_cost(sequences) + drafting
        return min(cost, UNKNOWN_COST) if len(self._drafted) < FEW else cost

    def step_cost(self, sequences: int) -> float:
        """The part of it that makes the step longer."""
        token_s = self.token_s(sequences)
        if not token_s or not self._drafted:
            return UNKNOWN_COST
        return max(LEAST_COST, quartile(self._drafted) / token_s)

    def token_s(self, sequences: int) -> float:
        """Seconds that cost so many sequences together one token; 0: unknown."""
        return self._plain_s(sequences) / max(sequences, 1)

    def _plain_s(self, sequences: int) -> float:
        """Of so many sequences, or of a number near it; 0: unknown."""
        if not self._plain:
            return 0.0
        nearest = min(self._plain, key=lambda number: abs(number - sequences))
        more = quartile(self._drafted) * (sequences - nearest) if self._drafted else 0.0
        return max(quartile(self._plain[nearest]) + more, 0.0)


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
        self._step_cost = UNKNOWN_COST
        self._drafting_s = 0.0  # of the drafts at hand

    def attach(self, backend: Backend) -> None:
        """Go on with another context."""
        self._settings = backend.settings
        self._times = StepTimes()
        self._on = backend.settings.speculative != "off" and backend.cuts
        self._adapts = backend.settings.speculative in ("auto", "draft")
        self._source: Source = backend.drafts or Lookups()
        # A draft model's savings are everybody's, and pay for what it reads of the next prompts.
        self._most_saved, self._most_pooled = (0.0, MOST_POOLED_MODEL) if backend.drafts else (MOST_SAVED, MOST_POOLED)
        self._pool = self._most_pooled
        self._room = min(backend.most_drafted, (backend.settings.ubatch - backend.settings.parallel) // 2)

    def draft(self, running: list[Sequence], free: int) -> None:
        """Give each that generates its draft; `free`: KV cells."""
        if not self._on:
            return
        self.drop(running)
        sequences = [sequence for sequence in running if sequence.decoding]
        cost, self._step_cost = self._times.cost(len(sequences)), self._times.step_cost(len(sequences))
        self._pool = min(self._most_pooled, self._pool + ALLOWED * len(sequences))
        if self._adapts and self._times.stale:
            return
        room = min(self._room, free - len(sequences))
        wanted = [(sequence, most) for sequence in sequences if (most := self._most(sequence, cost)) > 0]
        if not wanted:
            return
        source, token_s = self._source, self._times.token_s(len(sequences))
        source.propose(wanted, room, cost, max(self._pool - MOST_POOLED, 0.0) * token_s)
        self._drafting_s = source.drafting_s
        if token_s:  # what took long for other work on the host is not paid for to the end
            lost = (source.catch_up_s + source.drafting_s) / token_s
            self._pool = max(self._pool - lost, min(self._pool, -MOST_POOLED))

    def _most(self, sequence: Sequence, cost: float) -> int:
        if sequence.sampler.can_be_late:
            return 0
        drafter = sequence.drafter = sequence.drafter or Drafter()
        most = min(self._settings.speculative_depth, sequence.limit - len(sequence.tokens) - 1)
        if not self._adapts:
            return most
        affordable = int((drafter.saved + self._pool) / max(cost, self._step_cost))
        return min(most, drafter.depth(cost), affordable)

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
            self._times.saw(len(shares), drafted, seconds, self._drafting_s)
            self._step_cost = self._times.step_cost(len(shares))

    def verified(self, sequence: Sequence, accepted: int) -> None:
        """So many tokens of its draft came true."""
        drafted, sequence.draft = len(sequence.draft), []
        drafter = sequence.drafter
        if not drafted or drafter is None:
            return
        drafter.saw(drafted, accepted)
        self.drafted += drafted
        self.accepted += accepted
        saved = drafter.saved + accepted - drafted * self._step_cost
        drafter.saved = min(max(saved, 0.0), self._most_saved)
        self._pool = min(self._most_pooled, self._pool + saved - drafter.saved)


Wanted: TypeAlias = "tuple[Sequence, int]"
"""A sequence, and how many tokens to draft for it at most."""


def quartile(values: deque[float]) -> float:
    return sorted(values)[len(values) // 4]
