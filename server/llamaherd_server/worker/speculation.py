"""Decides how many tokens to draft for each sequence, from the acceptance of its drafts and from measured step times.

Costs and savings are in tokens: one is the time in which a sequence gets a token without drafts.
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

# What drafts may cost per generated token if none is accepted, and how much of that all sequences together may pool. A
# draft model's pool is larger; the part above MAX_POOL pays for reading prompts, before which it cannot draft.
ALLOWANCE, MAX_POOL, MAX_MODEL_POOL = 0.02, 8.0, 32.0
# Cap on a sequence's credited savings: it may lose all of them once its drafts are no longer accepted.
MAX_SAVED = 16.0
# Accepted tokens and rejected drafts that a new sequence starts with; and the factors by which its counts decay with
# each draft and with each token, so that drafting resumes after rejections.
PRIOR_HITS, PRIOR_MISSES, DRAFT_DECAY, TOKEN_DECAY = 4.0, 1.0, 0.5, 0.98
# Step times to remember; how many with drafts it takes to judge these expensive; and after how many steps of one kind
# (with or without drafts) the other kind's times are stale.
MAX_SAMPLES, MIN_SAMPLES, STALE_AFTER_STEPS = 16, 3, 50
UNKNOWN_COST, MIN_COST = 0.5, 0.01


class Drafter:
    """Tracks the acceptance of one sequence's drafts. `lookup`: the index of its own text, if that drafts."""

    def __init__(self) -> None:
        self.drafted = self.accepted = 0
        self.saved = 0.0
        self.lookup: Lookup | None = None
        self._hits = self._misses = 0.0

    def depth(self, cost: float) -> int:
        """Return how many tokens to draft at most: their joint chance of acceptance must exceed the `cost` of one."""
        self._hits, self._misses = TOKEN_DECAY * self._hits, TOKEN_DECAY * self._misses
        chance = (PRIOR_HITS + self._hits) / (PRIOR_HITS + PRIOR_MISSES + self._hits + self._misses)
        return int(math.log(cost) / math.log(chance)) if cost < 1 else 0

    def saw(self, drafted: int, accepted: int) -> None:
        self.drafted += drafted
        self.accepted += accepted
        self._hits = DRAFT_DECAY * self._hits + accepted
        self._misses = DRAFT_DECAY * self._misses + (accepted < drafted)


class Source(Protocol):
    """Proposes drafts. `catch_up_s`, `drafting_s`: seconds of the last call for reading tokens and for drafting."""

    catch_up_s: float
    drafting_s: float

    def propose(self, wanted: list[Wanted], room: int, worth: float, budget_s: float) -> None:
        """Set each sequence's draft, of at most `room` tokens in all.

        A token with a chance of acceptance below `worth` costs more than it saves. `budget_s`: seconds that may be
        spent on reading tokens before a sequence can be drafted for.
        """


class Lookups:
    """Implements Source by prompt lookup: repetitions within a sequence's own text."""

    catch_up_s = drafting_s = 0.0

    def propose(self, wanted: list[Wanted], room: int, worth: float, budget_s: float) -> None:  # noqa: ARG002 (free)
        for left, (sequence, most) in zip(range(len(wanted), 0, -1), wanted, strict=True):
            drafter = sequence.drafter
            assert drafter  # noqa: S101 (`Speculation` has set it)
            if (most := min(most, room // left)) > 0:
                drafter.lookup = drafter.lookup or Lookup(sequence.limit)
                sequence.draft = drafter.lookup.propose(sequence.tokens, most)
                room -= len(sequence.draft)


class StepTimes:
    """Measures what a drafted token adds to a step, by lower quartiles: other work on the host delays some steps."""

    def __init__(self) -> None:
        self._plain: dict[int, deque[float]] = {}  # seconds of steps without drafts, by number of sequences
        self._drafted: deque[float] = deque(maxlen=MAX_SAMPLES)  # seconds per drafted token that a step takes longer
        self._drafting: deque[float] = deque(maxlen=MAX_SAMPLES)  # seconds per drafted token to propose it
        self._consecutive = 0  # consecutive steps with drafts; negative: without

    @property
    def stale(self) -> bool:
        """Whether a step without drafts should be measured again."""
        return self._consecutive >= STALE_AFTER_STEPS

    def saw(self, sequences: int, drafted: int, seconds: float, drafting_s: float = 0.0) -> None:
        if not drafted:
            self._plain.setdefault(sequences, deque(maxlen=MAX_SAMPLES)).append(seconds)
            self._consecutive = min(self._consecutive, 0) - 1
            if self._consecutive <= -STALE_AFTER_STEPS and self._drafted:  # may be cheaper by now
                self._drafted.popleft()
                self._drafting.popleft()
                self._consecutive = 0
        elif plain_s := self._plain_s(sequences):
            self._drafted.append(max(seconds - plain_s, 0.0) / drafted)
            self._drafting.append(drafting_s / drafted)
            self._consecutive = max(self._consecutive, 0) + 1

    def cost(self, sequences: int) -> float:
        """Return the cost of a drafted token in a step of so many sequences."""
        token_s = self.token_s(sequences)
        drafting = quartile(self._drafting) / token_s if token_s and self._drafting else 0.0
        cost = self.step_cost(sequences) + drafting
        return min(cost, UNKNOWN_COST) if len(self._drafted) < MIN_SAMPLES else cost

    def step_cost(self, sequences: int) -> float:
        """Return the part of `cost` by which the step takes longer."""
        token_s = self.token_s(sequences)
        if not token_s or not self._drafted:
            return UNKNOWN_COST
        return max(MIN_COST, quartile(self._drafted) / token_s)

    def token_s(self, sequences: int) -> float:
        """Seconds per token of so many sequences together, without drafts; 0: unknown."""
        return self._plain_s(sequences) / max(sequences, 1)

    def _plain_s(self, sequences: int) -> float:
        """Seconds of a step without drafts, extrapolated from the nearest measured number; 0: unknown."""
        if not self._plain:
            return 0.0
        nearest = min(self._plain, key=lambda number: abs(number - sequences))
        more = quartile(self._drafted) * (sequences - nearest) if self._drafted else 0.0
        return max(quartile(self._plain[nearest]) + more, 0.0)


def draw(sample: Callable[[list[Row]], list[Drawn]], rows: list[Row]) -> list[list[Drawn]]:
    """Sample each sequence's next tokens: one from its row, then from the next rows as long as its draft is confirmed.

    A token is sampled as it would be without the draft, so that its distribution does not change.
    """
    drawn: list[list[Drawn]] = [[] for _ in rows]
    going = list(range(len(rows)))
    while going:
        tokens = sample([(rows[number][0], rows[number][1] + len(drawn[number])) for number in going])
        for number, token in zip(going, tokens, strict=True):
            drawn[number].append(token)
        going = [number for number in going if _is_confirmed(rows[number][0].draft, drawn[number])]
    return drawn


def _is_confirmed(draft: list[int], drawn: list[Drawn]) -> bool:
    return len(drawn) <= len(draft) and drawn[-1] == draft[len(drawn) - 1]


class Speculation:
    """Drafts for one scheduler. `drafted` and `accepted` count tokens since the start."""

    def __init__(self) -> None:
        self.drafted = self.accepted = 0
        self._pool = MAX_POOL
        self._step_cost = UNKNOWN_COST
        self._drafting_s = 0.0  # of the current drafts

    def attach(self, backend: Backend) -> None:
        """Continue on another context."""
        self._times = StepTimes()
        self._adapts = backend.settings.speculative in ("auto", "draft", "mtp")
        self._source: Source = backend.drafts or Lookups()
        # A draft model's savings go to the common pool, which pays for reading the next prompts.
        self._max_saved, self._max_pool = (0.0, MAX_MODEL_POOL) if backend.drafts else (MAX_SAVED, MAX_POOL)
        self._pool = self._max_pool
        self._depth = backend.draft_depth
        self._room = min(backend.most_drafted, (backend.settings.ubatch - backend.settings.parallel) // 2)

    def draft(self, running: list[Sequence], free: int) -> None:
        """Set the draft of each decoding sequence; `free`: free KV cells."""
        if not self._depth:
            return
        self.drop(running)
        sequences = [sequence for sequence in running if sequence.decoding]
        cost, self._step_cost = self._times.cost(len(sequences)), self._times.step_cost(len(sequences))
        self._pool = min(self._max_pool, self._pool + ALLOWANCE * len(sequences))
        if self._adapts and self._times.stale:
            return
        room = min(self._room, free - len(sequences))
        wanted = [(sequence, most) for sequence in sequences if (most := self._most(sequence, cost)) > 0]
        if not wanted:
            return
        source, token_s = self._source, self._times.token_s(len(sequences))
        source.propose(wanted, room, cost, max(self._pool - MAX_POOL, 0.0) * token_s)
        self._drafting_s = source.drafting_s
        if token_s:  # limits the debt: other work on the host may have caused it
            lost = (source.catch_up_s + source.drafting_s) / token_s
            self._pool = max(self._pool - lost, min(self._pool, -MAX_POOL))

    def _most(self, sequence: Sequence, cost: float) -> int:
        if sequence.sampler.can_be_late:
            return 0
        drafter = sequence.drafter = sequence.drafter or Drafter()
        most = min(self._depth, sequence.limit - len(sequence.tokens) - 1)
        if not self._adapts:
            return most
        affordable = int((drafter.saved + self._pool) / max(cost, self._step_cost))
        return min(most, drafter.depth(cost), affordable)

    @staticmethod
    def drop(sequences: list[Sequence]) -> bool:
        """Discard the drafts; returns whether there were any."""
        drafting = [sequence for sequence in sequences if sequence.draft]
        for sequence in drafting:
            sequence.draft = []
        return bool(drafting)

    def timed(self, shares: list[Share], seconds: float) -> None:
        """Record the time of a computed batch."""
        if not self._depth:
            return
        drafted = sum(len(sequence.draft) for sequence, _ in shares)
        if sum(count for _, count in shares) == len(shares) + drafted:  # no prompts
            self._times.saw(len(shares), drafted, seconds, self._drafting_s)
            self._step_cost = self._times.step_cost(len(shares))

    def verified(self, sequence: Sequence, accepted: int) -> None:
        """Record that `accepted` tokens of the sequence's draft were confirmed."""
        drafted, sequence.draft = len(sequence.draft), []
        drafter = sequence.drafter
        if not drafted or drafter is None:
            return
        drafter.saw(drafted, accepted)
        self.drafted += drafted
        self.accepted += accepted
        saved = drafter.saved + accepted - drafted * self._step_cost
        drafter.saved = min(max(saved, 0.0), self._max_saved)
        self._pool = min(self._max_pool, self._pool + saved - drafter.saved)


Wanted: TypeAlias = "tuple[Sequence, int]"
"""A sequence, and the maximum number of tokens to draft for it."""


def quartile(values: deque[float]) -> float:
    return sorted(values)[len(values) // 4]
