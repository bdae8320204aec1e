"""From windows to what is worth measuring next, what to confirm and what keeps its limits. All pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from msgspec import Struct

from llamaherd_loadtest.limits import Limit
from llamaherd_loadtest.quantiles import Judgement
from llamaherd_loadtest.tune.evidence import Record, judge_errors, judge_over, limit_noise, score_noise
from llamaherd_loadtest.tune.surrogate import Array, Belief, Grid

_DRAWS = 100
_MISS = 0.45  # what missing a limit costs, as a logarithm of the score
_PENALTY = 4.0  # and, for each such logarithm of the miss, on top: near misses stay above far ones
_LENIENCY = 0.5  # how many standard deviations a finalist may come nearer to a limit for nothing
_LIMIT_MARGIN = 1.0  # standard deviations from a limit that count as clear of it: 84 % sure


class Beliefs(Struct, frozen=True):
    """Each setting's log score and, for each limit, the logarithm of its figure over the limit."""

    score: Belief
    excess: list[tuple[Limit, Belief]]

    def next(self, ruled_out: Iterable[int], dice: np.random.Generator) -> int:
        """What to measure next: of the best and a rival, by two draws of what may be true, the less well known.

        Top-two Thompson sampling (Russo, "Simple Bayesian Algorithms for Best-Arm Identification", 2016): looking
        twice at a setting that is sure to be good tells less than looking once at what may beat it.
        """
        worth = self._worth(ruled_out, dice)
        bests = np.argmax(worth, axis=1)
        rivals = bests[bests != bests[0]]
        return int(max((bests[0], *rivals[:1]), key=lambda row: worth[:, row].std()))

    def regret(self, chosen: int, ruled_out: Iterable[int], dice: np.random.Generator) -> float:
        """What that setting may lose on the best one, as a logarithm of the score: 5 % of the draws lose more."""
        worth = self._worth(ruled_out, dice)
        return float(np.quantile(worth.max(axis=1) - worth[:, chosen], 0.95))

    def best(self, count: int, ruled_out: Iterable[int]) -> list[int]:
        """The `count` settings that look best, those that may miss a limit marked down."""
        excess = [np.maximum(0.0, b.mean + _LENIENCY * b.sd) for _, b in self.excess]
        score = self.score.mean - _PENALTY * sum(excess, np.zeros_like(self.score.mean))
        score[list(ruled_out)] = -np.inf
        return [int(i) for i in np.argsort(-score)[:count] if math.isfinite(score[i])]

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
        errors = judge_errors(record.windows)
        worst = (errors, "" if errors is Judgement.PASSES else "error_rate")
        if errors is Judgement.MISSES:
            return worst
        if record.failed_once:
            worst = (Judgement.UNRESOLVED, "failure")
        for limit, belief in self.excess:
            mean, margin = float(belief.mean[row]), _LIMIT_MARGIN * float(belief.sd[row])
            pooled = judge_over(record.windows, limit)
            if mean - margin > 0 or pooled is Judgement.MISSES:
                return Judgement.MISSES, limit.name
            if mean + margin > 0 or pooled is Judgement.UNRESOLVED:
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
