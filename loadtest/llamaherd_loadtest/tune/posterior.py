"""The algebra of the model: the posterior of Gaussian processes that share a few linear parameters.

Each figure (the score, a latency's location, its tail) of setting x in a window is

    prior(x) + basis(x) z + features(x) w + own(x) + noise

z: parameters shared by all figures, of mean 0 and variance 1. w: further effects of the knobs' values, of variance
size². own: the effect of a setting that no sum of knobs explains, of variance (size OWN_SD)². Given z, figures are
independent, so the largest matrix has one row per window (Rasmussen and Williams, Gaussian Processes for Machine
Learning, 2.7).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
OWN_SD = 0.03
MISFITS = np.array([0.1, 0.2, 0.35, 0.6, 1.0, 1.6])
NOISES = np.array([0.005, 0.01, 0.02, 0.03, 0.045, 0.065, 0.09, 0.13, 0.19, 0.27])
_TYPICAL_NOISE, _NOISE_SPREAD, _MISFIT_SPREAD = 0.06, 0.9, 1.5
_PRIOR = [
    [0.5 * float((np.log(n / _TYPICAL_NOISE) / _NOISE_SPREAD) ** 2 + (np.log(m) / _MISFIT_SPREAD) ** 2) for n in NOISES]
    for m in MISFITS
]
Sizes = tuple[int, int]  # indices into MISFITS and NOISES


class Information(NamedTuple):
    """What a figure's windows contribute: precision and pull on the shared parameters, and the log probability of its
    sizes."""

    precision: Array
    pull: Array
    logp: float


class Figure:
    """One figure, measured at `rows` of the space; `features`: setting x feature. The variance of a window is `share`
    of the noise's, plus `sampling`."""

    def __init__(self, features: Array, rows: Array, share: Array, sampling: Array, sizes: Sizes) -> None:
        self.rows, self._features, self._share, self._sampling = rows, features, share, sampling
        self._here = features[rows]
        self._correlation = self._here @ self._here.T + OWN_SD**2 * (rows[:, None] == rows)
        self.resize(sizes)

    def resize(self, sizes: Sizes) -> None:
        self.sizes, self._size = sizes, float(MISFITS[sizes[0]])
        self._variance = NOISES[sizes[1]] ** 2 * self._share + self._sampling
        self._inverse = np.linalg.inv(self._size**2 * self._correlation + np.diag(self._variance))

    def inform(self, basis: Array, residual: Array) -> Information:
        """Return what the windows contribute, given their `basis` (window x parameter) and `residual`."""
        self.basis, self.residual = basis, residual
        weighed = basis.T @ self._inverse
        logdet = float(np.linalg.slogdet(self._inverse)[1]) if len(residual) else 0.0
        fit = float(residual @ self._inverse @ residual)
        return Information(
            weighed @ basis, weighed @ residual, 0.5 * (logdet - fit) - _PRIOR[self.sizes[0]][self.sizes[1]]
        )

    def pull(self, values: Array) -> Array:
        found: Array = self.basis.T @ (self._inverse @ values)
        return found

    def misfits(self, values: Array, rows: Array) -> Array:
        """Return the mean misfits of `rows`, given noisy `values` of the windows (window, or window x column)."""
        weights = self._inverse @ values
        own = np.zeros((len(self._features), *values.shape[1:]))
        np.add.at(own, self.rows, (self._size * OWN_SD) ** 2 * weights)
        found: Array = self._features[rows] @ (self._size**2 * (self._here.T @ weights)) + own[rows]
        return found

    def draw(self, rng: np.random.Generator, count: int, rows: Array) -> tuple[Array, Array]:
        """Return prior draws of the misfits of `rows` (row x draw), and of those of the windows, with noise."""
        both, place = np.unique([*rows, *self.rows], return_inverse=True)
        knobs = self._features[both] @ rng.standard_normal((self._features.shape[1], count))
        found = (self._size * (knobs + OWN_SD * rng.standard_normal((len(both), count))))[place]
        noise = np.sqrt(self._variance)[:, None] * rng.standard_normal((len(self.rows), count))
        return found[: len(rows)], found[len(rows) :] + noise

    def covariance(self, rows: Array) -> Array:
        """Return the posterior covariance of the misfits of `rows`."""
        there, size = self._features[rows], self._size**2
        across = size * (there @ self._here.T + OWN_SD**2 * (rows[:, None] == self.rows))
        found: Array = size * (there @ there.T + OWN_SD**2 * np.eye(len(rows))) - across @ self._inverse @ across.T
        return found

    def variances(self) -> Array:
        """Return the posterior variances of the misfits of all settings."""
        size, measured = self._size**2, np.unique(self.rows)
        towards = size * self._here.T
        knobs = size * np.eye(len(towards)) - towards @ self._inverse @ towards.T
        found: Array = ((self._features @ knobs) * self._features).sum(axis=1) + size * OWN_SD**2
        found[measured] = np.diag(self.covariance(measured))
        return found


class Shared:
    """The posterior of the shared parameters; `moved` is their mean, relative to the point of linearisation."""

    def __init__(self, information: Sequence[Information], offset: Array) -> None:
        """`offset` is the point of linearisation, in prior deviations from the prior mean."""
        self.precision = sum((t.precision for t in information), np.eye(len(offset)))
        pull = sum((t.pull for t in information), -offset)
        root = np.linalg.cholesky(self.precision)
        half = np.linalg.solve(root, pull)
        self.moved = np.linalg.solve(root.T, half)
        self.logp = sum(t.logp for t in information) + 0.5 * float(half @ half) - float(np.log(np.diag(root)).sum())

    def root(self) -> Array:
        """Return a square root of the covariance."""
        found: Array = np.linalg.inv(np.linalg.cholesky(self.precision)).T
        return found


class Posterior:
    """Mean, standard deviation and draws of all figures of all settings."""

    def __init__(self, figures: Sequence[Figure], shared: Shared, prior: Array, basis: Array) -> None:
        """`prior`: figure x setting; `basis`: figure x setting x parameter."""
        self._figures, self._shared, self._basis = figures, shared, basis
        moved, root = shared.moved, shared.root()
        each, every = [*zip(figures, prior, basis, strict=True)], np.arange(prior.shape[1])
        self.mean = np.array([p + b @ moved + f.misfits(f.residual - f.basis @ moved, every) for f, p, b in each])
        self._reach = np.array([(b - f.misfits(f.basis, every)) @ root for f, _, b in each])
        self.variance = np.array([f.variances() for f in figures]) + (self._reach**2).sum(axis=2)

    def apart(self, rows: Array) -> Array:
        """Return the standard deviations of the first figure of `rows` minus that of `rows[0]`."""
        cov = self._figures[0].covariance(rows)
        reach = self._reach[0, rows] - self._reach[0, rows[0]]
        variance = np.diag(cov) + cov[0, 0] - 2 * cov[0] + (reach**2).sum(axis=1)
        found: Array = np.sqrt(np.maximum(variance, 0.0))
        return found

    def draws(self, rng: np.random.Generator, count: int, rows: Array) -> Array:
        """Return posterior draws (figure x draw x row): prior draws corrected by the windows (Matheron's rule)."""
        figures, z = self._figures, rng.standard_normal((self._basis.shape[2], count))
        drawn = [figure.draw(rng, count, rows) for figure in figures]
        lacks = [-here - f.basis @ z for f, (_, here) in zip(figures, drawn, strict=True)]
        pull = sum((f.pull(lack) for f, lack in zip(figures, lacks, strict=True)), np.zeros_like(z))
        moved = np.linalg.solve(self._shared.precision, pull)
        found = [
            mean[rows, None] + basis[rows] @ (z + moved) + there + f.misfits(lack - f.basis @ moved, rows)
            for f, mean, basis, (there, _), lack in zip(figures, self.mean, self._basis, drawn, lacks, strict=True)
        ]
        return np.array(found).transpose(0, 2, 1)
