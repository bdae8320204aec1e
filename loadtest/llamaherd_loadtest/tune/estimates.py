"""Estimates of settings: their score, their distance from each limit, and which to measure next."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

from llamaherd_loadtest.limits import Limit
from llamaherd_loadtest.tune.posterior import Array

_DRAWS, _PROMISING = 32, 128
_MISS_COST = 0.45  # cost of missing a limit, as a logarithm of the score
_EXCESS_COST = 4.0  # additional cost per unit of log excess, so that near misses rank above far ones
# Standard deviations of the best known setting within which a few windows cannot show that a limit is kept, and the
# bounds of that log distance.
_NEAR_LIMIT, _NEAR_LIMIT_BOUNDS = 1.3, (0.005, 0.05)


class Estimates:
    """The log score and, for each limit, the logarithm of its figure over the limit, for some `rows` of the space.

    `mean`, `sd`: figure x row. `apart`: standard deviation of a row's score minus that of row 0, the current settings,
    at the `measured` places among the rows. `draws` returns posterior draws at some places: figure x draw x place.
    Everything refers to the host in the `middle` of the search so far, a share of the budget. `drift` is the logarithm
    of the host's speed-up over the budget, `noise` the standard deviation of a window's log score.
    """

    def __init__(
        self,
        rows: Array,
        mean: Array,
        sd: Array,
        apart: Array,
        draws: Callable[[np.random.Generator, int, Array], Array],
        *,
        limits: Sequence[Limit],
        measured: Array,
        drift: float,
        middle: float,
        noise: float,
    ) -> None:
        self._rows, self._place = rows, {int(row): place for place, row in enumerate(rows)}
        self._mean, self._sd, self._apart, self._draws, self._limits = mean, sd, apart, draws, limits
        self.drift, self.middle, self.noise = drift, middle, noise
        self._near = np.clip(_NEAR_LIMIT * sd[1:, measured].min(axis=1, initial=1.0), *_NEAR_LIMIT_BOUNDS)

    def score(self, row: int) -> float | None:
        place = self._place.get(row)
        return None if place is None else math.exp(float(self._mean[0, place]))

    def gain(self, row: int) -> tuple[float, float]:
        """Mean and standard deviation of a measured row's log score minus that of row 0, the current settings."""
        place = self._place[row]
        return float(self._mean[0, place] - self._mean[0, 0]), float(self._apart[place])

    def risk(self, row: int) -> float:
        """The probability that a row misses a limit."""
        return 1 - math.prod(NormalDist().cdf(-mean / max(sd, 1e-9)) for _, mean, sd in self.excess(row))

    def excess(self, row: int) -> list[tuple[Limit, float, float]]:
        """Each limit with the mean and the standard deviation of a row's log figure over it."""
        at = self._place[row]
        return [(lim, float(self._mean[i, at]), float(self._sd[i, at])) for i, lim in enumerate(self._limits, 1)]

    def next(self, allowed: Array, rng: np.random.Generator) -> int | None:
        """Return the row to measure next, of the `allowed` ones (a boolean per row): of leader and rival, the less well
        known.

        The leader has the highest mean. The rival is the best row of one posterior draw, chosen in proportion to its
        improvement on the leader: top-two expected improvement (Qin, Klabjan and Russo, "Improving the expected
        improvement algorithm", 2017). A second look at a setting that is surely good is worth less than a first look at
        one that may beat it.
        """
        places = self._promising(allowed)
        if not len(places):
            return None
        worth = self._worth(places, rng)
        leader = int(np.argmax(worth.mean(axis=0)))
        regret = worth.max(axis=1) - worth[:, leader]
        if regret.sum() <= 0:
            return int(self._rows[places[leader]])
        rival = int(np.argmax(worth[rng.choice(len(worth), p=regret / regret.sum())]))
        return int(self._rows[places[max((leader, rival), key=lambda one: worth[:, one].std())]])

    def regret(self, chosen: int, allowed: Array, rng: np.random.Generator) -> float:
        """Return the expected loss of `chosen` against the best row, in log score, averaged over the draws."""
        others = np.arange(len(allowed)) != chosen
        worth = self._worth(np.append(self._promising(allowed & others), self._place[chosen]), rng)
        return float((worth.max(axis=1) - worth[:, -1]).mean())

    def best(self, count: int, allowed: Array, doubt: float = 0.5) -> list[int]:
        """Return the `count` best rows; those over a limit or within `doubt` deviations of it are penalised."""
        score = self._mean[0] - _cost(self._mean[1:] + doubt * self._sd[1:]).sum(axis=0)
        return [int(self._rows[place]) for place in self._highest(score, allowed)[:count]]

    def promising(self) -> Array:
        """Return the rows that may be best."""
        return self._rows[self._promising(np.ones(int(self._rows[-1]) + 1, bool))]

    def _promising(self, allowed: Array) -> Array:
        """Return the places that may be best, each figure taken two deviations to its favour."""
        over = self._mean[1:] - 2 * self._sd[1:] + self._near[:, None]
        return self._highest(self._mean[0] + 2 * self._sd[0] - _cost(over).sum(axis=0), allowed)[:_PROMISING]

    def _highest(self, score: Array, allowed: Array) -> Array:
        places = np.argsort(-score, kind="stable")
        return places[allowed[self._rows[places]]]

    def _worth(self, places: Array, rng: np.random.Generator) -> Array:
        """Return draws of each place's value (draw x place); misses and near misses of limits are penalised."""
        score, *excess = self._draws(rng, _DRAWS, places)
        worth: Array = score - sum((_cost(e + near) for e, near in zip(excess, self._near, strict=True)), 0.0)
        return worth


def _cost(over: Array) -> Array:
    """Return the cost of exceeding limits by these logarithms."""
    cost: Array = np.where(over > 0, _MISS_COST + _EXCESS_COST * over, 0.0)
    return cost
