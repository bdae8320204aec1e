"""What the model says of settings: of their score, of each limit, and which to measure next."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

from llamaherd_loadtest.limits import Limit
from llamaherd_loadtest.tune.posterior import Array

_DRAWS, _HOPEFUL = 32, 128
_MISS = 0.45  # what missing a limit costs, as a logarithm of the score
_PENALTY = 4.0  # and, for each such logarithm of the miss, on top: near misses stay above far ones
_SURE = 1.3  # deviations of the best known setting: nearer to a limit, no few windows say that it is kept
_NEAR = (0.005, 0.05)


class Estimates:
    """The log score and, for each limit, the logarithm of its figure over the limit, of some `rows` of the space.

    `mean`, `sd`: figure x row. `apart`: standard deviation of the score less that of the first row, the current
    settings', where `measured` (places among the rows). `draws` makes so many draws at some places: figure x draw x
    place. All is of a host as it was in the `middle` of the search so far, a share of the budget;
    `drift` is how much faster its score is at the end than at the start, as a logarithm; `noise` a window's.
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
        self._near = np.clip(_SURE * sd[1:, measured].min(axis=1, initial=1.0), *_NEAR)

    def score(self, row: int) -> float | None:
        place = self._place.get(row)
        return None if place is None else math.exp(float(self._mean[0, place]))

    def gain(self, row: int) -> tuple[float, float]:
        """Mean and standard deviation of a measured row's log score less that of the first, the current settings."""
        place = self._place[row]
        return float(self._mean[0, place] - self._mean[0, 0]), float(self._apart[place])

    def risk(self, row: int) -> float:
        """The chance that a row misses a limit."""
        return 1 - math.prod(NormalDist().cdf(-mean / max(sd, 1e-9)) for _, mean, sd in self.excess(row))

    def excess(self, row: int) -> list[tuple[Limit, float, float]]:
        """Each limit with the mean and the standard deviation of a row's logarithm over it."""
        at = self._place[row]
        return [(lim, float(self._mean[i, at]), float(self._sd[i, at])) for i, lim in enumerate(self._limits, 1)]

    def next(self, allowed: Array, rng: np.random.Generator) -> int | None:
        """What to measure next, of the rows that are `allowed` (a truth value each): of the setting that looks best and
        a rival, the less well known.

        The rival is the best of one draw of what may be true, drawn by how much better it is there: top-two sampling by
        expected improvement (Qin, Klabjan and Russo, "Improving the expected improvement algorithm", 2017). Looking
        twice at a setting that is sure to be good tells less than looking once at what may beat it.
        """
        places = self._hopeful(allowed)
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
        """What that setting loses on the best one, as a logarithm of the score: the mean of the draws."""
        others = np.arange(len(allowed)) != chosen
        worth = self._worth(np.append(self._hopeful(allowed & others), self._place[chosen]), rng)
        return float((worth.max(axis=1) - worth[:, -1]).mean())

    def best(self, count: int, allowed: Array, doubt: float = 0.5) -> list[int]:
        """The `count` rows that look best; one that comes within `doubt` deviations of a limit is marked down."""
        score = self._mean[0] - _missing(self._mean[1:] + doubt * self._sd[1:]).sum(axis=0)
        return [int(self._rows[place]) for place in self._highest(score, allowed)[:count]]

    def hopeful(self) -> Array:
        """The rows that may be best, be it by luck."""
        return self._rows[self._hopeful(np.ones(int(self._rows[-1]) + 1, bool))]

    def _hopeful(self, allowed: Array) -> Array:
        """The places that may be best, by two deviations of each figure."""
        over = self._mean[1:] - 2 * self._sd[1:] + self._near[:, None]
        return self._highest(self._mean[0] + 2 * self._sd[0] - _missing(over).sum(axis=0), allowed)[:_HOPEFUL]

    def _highest(self, score: Array, allowed: Array) -> Array:
        places = np.argsort(-score, kind="stable")
        return places[allowed[self._rows[places]]]

    def _worth(self, places: Array, rng: np.random.Generator) -> Array:
        """Draws of what settings may be worth, a draw a row; one that misses a limit sinks below the rest."""
        score, *excess = self._draws(rng, _DRAWS, places)
        worth: Array = score - sum((_missing(e + near) for e, near in zip(excess, self._near, strict=True)), 0.0)
        return worth


def _missing(over: Array) -> Array:
    """What it costs to be so far over a limit."""
    cost: Array = np.where(over > 0, _MISS + _PENALTY * over, 0.0)
    return cost
