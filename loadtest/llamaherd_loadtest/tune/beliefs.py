"""From windows to what is worth measuring next, what to confirm and what keeps its limits. All pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from enum import StrEnum
from statistics import NormalDist

import numpy as np
from msgspec import Struct

from llamaherd_loadtest.limits import Limit
from llamaherd_loadtest.tune.evidence import MAX_ERROR_SHARE, Record, limit_noise, score_noise
from llamaherd_loadtest.tune.surrogate import Array, Belief, Grid

_DRAWS = 100
_NEAR = 0.03  # how far below the best counts as being as good
_MISS = 0.45  # what missing a limit costs, as a logarithm of the score
_PENALTY = 4.0  # and, for each such logarithm of the miss, on top: near misses stay above far ones
_LIMIT_MARGIN = 0.5  # standard deviations from a limit that count as clear of it


class Judgement(StrEnum):
    """Does a setting keep its limits? UNRESOLVED: it is too close to one for the noise."""

    PASSES = "passes"
    UNRESOLVED = "unresolved"
    MISSES = "misses"


class Beliefs(Struct, frozen=True):
    """Each setting's log score and, for each limit, the logarithm of its figure over the limit."""

    score: Belief
    excess: list[tuple[Limit, Belief]]

    def next(self, ruled_out: Iterable[int], dice: np.random.Generator) -> int:
        """What to measure next: of the best and its closest rival, by draws of what may be true, the less well known.

        Top-two Thompson sampling (Russo, "Simple Bayesian Algorithms for Best-Arm Identification", 2016): looking
        twice at a setting that is sure to be good tells less than looking once at what may beat it.
        """
        worth = self._worth(ruled_out, dice)
        bests = np.argmax(worth, axis=1)
        rivals = bests[bests != bests[0]]
        return int(max((bests[0], *rivals[:1]), key=lambda row: worth[:, row].std()))

    def best(self, count: int, ruled_out: Iterable[int], dice: np.random.Generator) -> list[int]:
        """The `count` settings among which one is likeliest to be as good as the best: also what to fall back upon."""
        worth = self._worth(ruled_out, dice)
        good = (worth > worth.max(axis=1, keepdims=True) - _NEAR) & np.isfinite(worth)
        rows: list[int] = []
        left = np.ones(len(good), dtype=bool)  # draws in which none of the rows is good
        while len(rows) < count:
            hits = good[left].sum(axis=0) + good.mean(axis=0) / 2  # the mean decides between equals
            hits[rows] = 0
            if not hits.any():
                break
            rows.append(int(np.argmax(hits)))
            left &= ~good[:, rows[-1]]
        return rows

    def worth(self, row: int) -> float:
        """The expected log score of a setting, less what it costs where it misses a limit."""
        value = float(self.score.mean[row])
        for _, belief in self.excess:
            mean, sd = float(belief.mean[row]), float(belief.sd[row])
            missed = NormalDist().cdf(mean / sd)
            value -= _MISS * missed + _PENALTY * (mean * missed + sd * NormalDist().pdf(mean / sd))
        return value

    def _worth(self, ruled_out: Iterable[int], dice: np.random.Generator) -> Array:
        """Draws of what each setting may be worth, one a row; one that misses a limit sinks below the rest."""
        worth = self.score.draw(_DRAWS, dice)
        for _, belief in self.excess:
            drawn = belief.draw(_DRAWS, dice)
            worth -= np.where(drawn > 0, _MISS + _PENALTY * drawn, 0.0)
        worth[:, list(ruled_out)] = -np.inf
        return worth

    def judge(self, row: int, record: Record) -> tuple[Judgement, str]:
        """The worst judgement of a measured setting, and the limit's name (or "error_rate")."""
        if record.error_share > MAX_ERROR_SHARE:
            return Judgement.MISSES, "error_rate"
        worst = (Judgement.PASSES, "")
        for limit, belief in self.excess:
            mean, margin = float(belief.mean[row]), _LIMIT_MARGIN * float(belief.sd[row])
            if mean - margin > 0:
                return Judgement.MISSES, limit.name
            if mean + margin > 0:
                worst = (Judgement.UNRESOLVED, limit.name)
        return worst

    def nearest_miss(self, rows: Iterable[int]) -> tuple[int, str, float] | None:
        """Where no setting of `rows` keeps its limits: the nearest, the limit it misses, and by what share."""
        worst = [max((float(b.mean[row]), limit.name, row) for limit, b in self.excess) for row in rows if self.excess]
        excess, name, row = min(worst, default=(0.0, "", 0))
        return (row, name, math.expm1(excess)) if excess > 0 else None


def believe(grid: Grid, records: Sequence[Record], limits: Sequence[Limit]) -> Beliefs:
    """Read all windows without a fault; `records` in the order of the grid, at least one of them measured."""
    rows = [(row, m) for row, record in enumerate(records) for m in record.all_windows if not m.fault]
    score = grid.believe(
        [row for row, _ in rows], [math.log(max(m.score, 1e-9)) for _, m in rows], score_noise(records).sigma
    )
    excess = []
    for limit in limits:
        seen = [(row, m.observed[limit.name]) for row, m in rows if limit.name in m.observed]
        logs = [math.log(max(value, 1e-6) / limit.ms) for _, value in seen]
        if not seen:
            continue  # no request has such a figure: one token has no TPOT
        excess.append((limit, grid.believe([row for row, _ in seen], logs, limit_noise(records, limit).sigma)))
    return Beliefs(score, excess)
