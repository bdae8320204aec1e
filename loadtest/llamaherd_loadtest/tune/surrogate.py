"""What all windows together say about each setting: a Gaussian process over the grid.

Settings that share a knob's value share evidence, so a few windows say something about a large grid. Figures are
logarithms, in which knobs are close to additive: the kernel is a sum over knobs, plus a part of each setting's own for
what knobs do together. Numbers are near where they are near on a logarithmic scale, and the exponential kernel
(Ornstein-Uhlenbeck) allows cliffs. Rasmussen and Williams, Gaussian Processes for Machine Learning, algorithm 2.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from llamaherd_loadtest.tune.settings import Settings, Value

Array = NDArray[np.float64]

_KNOB_SD = 0.3  # how far one knob may move a figure, as a logarithm
_OWN_SD = 0.06  # and what is left to the combination
_LEVEL_SD = 3.0
_OCTAVES = 3.0  # length scale of numeric knobs
_JITTER = 1e-8  # of a variance, which rounding may leave below nothing


class Belief(Struct, frozen=True):
    """Mean and standard deviation of each setting's true logarithm, in the order of the grid; `cov` between them."""

    mean: Array
    cov: Array

    @property
    def sd(self) -> Array:
        return np.sqrt(np.diag(self.cov))

    def draw(self, count: int, dice: np.random.Generator) -> Array:
        """`count` guesses at all the true logarithms together, one a row."""
        root = np.linalg.cholesky(self.cov + _JITTER * np.eye(len(self.mean)))
        return self.mean + dice.standard_normal((count, len(self.mean))) @ root.T


class Grid:
    """The settings and how alike they are."""

    def __init__(self, settings: Sequence[Settings]) -> None:
        self._kernel = _LEVEL_SD**2 + _OWN_SD**2 * np.eye(len(settings))
        for knob in settings[0]:
            values = [s[knob] for s in settings]
            if len(set(values)) > 1:
                self._kernel = self._kernel + _KNOB_SD**2 * np.array([[_alike(a, b) for b in values] for a in values])

    def believe(self, rows: Sequence[int], logs: Sequence[float], noise_sd: float) -> Belief:
        """The posterior, after windows at `rows` of the grid that gave `logs`, each with noise `noise_sd`."""
        seen, which = np.unique(rows, return_inverse=True)
        counts = np.bincount(which)
        centre = float(np.mean(logs))
        y = np.bincount(which, weights=logs) / counts - centre
        k_seen = self._kernel[:, seen]
        gain = np.linalg.solve(k_seen[seen] + np.diag(noise_sd**2 / counts), k_seen.T).T
        return Belief(centre + gain @ y, self._kernel - gain @ k_seen.T)


def _alike(a: Value, b: Value) -> float:
    if isinstance(a, int | float) and isinstance(b, int | float) and a > 0 and b > 0:
        return math.exp(-abs(math.log2(a / b)) / _OCTAVES)
    return float(a == b)
