"""What all windows together say about each setting: a Gaussian process over the grid.

Settings that share a knob's value share evidence, so a few windows say something about a large grid. Figures are
logarithms, in which knobs are close to additive: the kernel is a sum over knobs, plus a part of each setting's own for
what knobs do together. Of numbers, one part is smooth on a logarithmic scale, and one is exponential
(Ornstein-Uhlenbeck) and allows cliffs. A part of which the windows show nothing is made small, by the likelihood of
what was seen: where a knob does not move a latency, the windows of all its values say how near the limit is.
Rasmussen and Williams, Gaussian Processes for Machine Learning, algorithm 2.1 and section 5.4.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from llamaherd_loadtest.tune.settings import Settings, Value

Array = NDArray[np.float64]

_KNOB_SD = 0.3  # how far one knob may move a figure, as a logarithm
_OWN_SD = 0.06  # and what is left to the combination
_LITTLE = 0.05  # of that, where there is nothing to see of it
_DOUBT = 2.0  # how much likelier, as a logarithm, it must make what was seen
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
        self._parts = [_OWN_SD**2 * np.eye(len(settings))]
        for knob in settings[0]:
            values = [s[knob] for s in settings]
            if len(set(values)) > 1:
                self._parts += [
                    _KNOB_SD**2 * np.array([[alike(a, b) for b in values] for a in values]) for alike in _ALIKE
                ]

    def believe(self, rows: Sequence[int], logs: Sequence[float], noise_sd: float) -> Belief:
        """The posterior, after windows at `rows` of the grid that gave `logs`, each with noise `noise_sd`."""
        seen, which = np.unique(rows, return_inverse=True)
        counts = np.bincount(which)
        centre = float(np.mean(logs))
        y = np.bincount(which, weights=logs) / counts - centre
        noise = np.diag(noise_sd**2 / counts)
        kernel = self._likely_kernel(seen, y, noise)
        k_seen = kernel[:, seen]
        gain = np.linalg.solve(k_seen[seen] + noise, k_seen.T).T
        return Belief(centre + gain @ y, kernel - gain @ k_seen.T)

    def _likely_kernel(self, seen: NDArray[np.int64], y: Array, noise: Array) -> Array:
        """All parts, each made small where that makes `y` clearly likelier."""
        at = np.ix_(seen, seen)
        kernel = sum(self._parts, np.array(_LEVEL_SD**2))
        likelihood = _log_likelihood(kernel[at] + noise, y)
        for part in self._parts:
            less = kernel - (1 - _LITTLE**2) * part
            other = _log_likelihood(less[at] + noise, y)
            if other > likelihood + _DOUBT:
                kernel, likelihood = less, other
        return kernel


def _log_likelihood(cov: Array, y: Array) -> float:
    """Of `y` under a normal distribution, less a constant."""
    root = np.linalg.cholesky(cov)
    return float(-0.5 * np.sum(np.linalg.solve(root, y) ** 2) - np.log(np.diag(root)).sum())


def _smooth(octaves: float) -> float:
    return math.exp(-((octaves / _OCTAVES) ** 2) / 2)


def _rough(octaves: float) -> float:
    return math.exp(-octaves / _OCTAVES)


def _by(correlation: Callable[[float], float]) -> Callable[[Value, Value], float]:
    """How alike two values are: numbers by their distance, others all or nothing."""

    def alike(a: Value, b: Value) -> float:
        if isinstance(a, int | float) and isinstance(b, int | float) and a > 0 and b > 0:
            return correlation(abs(math.log2(a / b)))
        return float(a == b)

    return alike


_ALIKE = (_by(_smooth), _by(_rough))
