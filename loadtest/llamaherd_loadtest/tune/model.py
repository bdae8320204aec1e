"""Estimates every setting of a host, measured or not, from all windows together.

Figures are logarithms: of the score and, for each limited latency, of its location (the mean logarithm) and of its tail
(how far the limited quantile lies above the location). The true figure of a setting is

    physics(theta) + misfit of each knob's value + misfit of the setting itself

The physics is linearised about the most probable theta (Laplace's approximation); a tail has an unknown level in its
place. Misfits are Gaussian processes, independent for each figure: an exponential kernel, which allows cliffs,
correlates numbers that are close on a logarithmic scale. A window adds noise, and a drift of the host that is linear in
time and common to speed and latencies. The sizes of misfits and noise are those that make the windows most probable.
Everything is then linear and Gaussian: see posterior.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean
from typing import NamedTuple

import numpy as np

from llamaherd_loadtest.limits import Limit
from llamaherd_loadtest.tune.estimates import Estimates
from llamaherd_loadtest.tune.evidence import Measurement
from llamaherd_loadtest.tune.objective import Objective
from llamaherd_loadtest.tune.physics import MEAN, SD, Physics, Shape
from llamaherd_loadtest.tune.posterior import MISFITS, NOISES, Array, Figure, Information, Posterior, Shared
from llamaherd_loadtest.tune.settings import Settings, Value

_KNOB_SD = {"parallel": 0.25}
_OTHER_KNOB_SD = 0.12
_LEVEL_SD = 0.5
_DRIFT_SD = 0.15  # over the budget
_TAIL, _TAIL_SD = 0.4, 0.4  # prior of a tail's level
_OCTAVES = 3.0  # length scale of numeric knobs
_SPREAD, _SPREAD_WORTH = 0.3, 10.0  # prior spread of a window's log latencies, and its weight in requests
_LEARN_GROWTH, _LEARN_ALWAYS = 1.25, 12  # sizes are learned at each window up to 12, then as windows grow by 1.25
_METRICS = {"ttft": "ttft", "tpot": "tpot", "itl": "tpot", "gap": "tpot", "e2e": "e2e"}


class Window(NamedTuple):
    """One window: its row of the space, the share of the budget at which it began, and its figures.

    `score` is a logarithm. For each limit, `locations` holds the mean logarithm of latencies over the limit, `tails`
    how far the limited quantile lies above it, and `spreads` the variance and number of the log latencies. If single
    latencies are unknown, the location is the quantile's and the tail is NaN.
    """

    row: int
    at: float
    requests: int
    score: float
    locations: list[float]
    tails: list[float]
    spreads: list[tuple[float, int]]


class Model:
    """Collects windows and estimates from them."""

    def __init__(
        self, settings: Sequence[Settings], limits: Sequence[Limit], objective: Objective, shape: Shape
    ) -> None:
        self._limits, self._shape, aim = limits, shape, objective.limit
        self._metrics = [_METRICS[aim.metric] if aim else "tokens", *(_METRICS[limit.metric] for limit in limits)]
        self._signs = np.array([-1.0 if aim else 1.0, *(1.0 for _ in limits)])[:, None, None]
        self._offsets = np.array([0.0, *(math.log(1000 / limit.ms) for limit in limits)])[:, None, None]
        if objective.name == "requests":
            self._offsets[0] = -math.log(shape.output)
        self._drifts = np.array([1.0, *(-1.0 for _ in limits)])  # latencies are longer on a slower host
        self._offset = np.zeros(len(SD) + 1 + len(limits))  # theta, drift and tails' levels, in prior deviations
        self._sizes = [(4, 5)] * (len(self._metrics) + len(limits))
        self._windows: list[Window] = []
        self._learned = 0
        self.space(settings)

    def space(self, settings: Sequence[Settings]) -> None:
        """Replace the settings; the rows of the previous ones must stay the same."""
        self._physics = Physics(settings, self._shape)
        columns = [np.full((len(settings), 1), _LEVEL_SD)]
        for knob in settings[0]:
            values = list(dict.fromkeys(s[knob] for s in settings))
            if len(values) > 1:
                correlation = np.array([[_correlation(a, b) for b in values] for a in values])
                root = np.linalg.cholesky(correlation + 1e-9 * np.eye(len(values)))
                place = {value: i for i, value in enumerate(values)}
                columns.append(_KNOB_SD.get(knob, _OTHER_KNOB_SD) * root[[place[s[knob]] for s in settings]])
        self._features = np.hstack(columns)

    def add(self, row: int, window: Measurement, at: float) -> None:
        """Add a window without a fault that began at this share of the budget."""
        locations, tails, spreads = [], [], []
        for limit in self._limits:
            quantile, values = window.observed.get(limit.name, 0.0), window.latencies_ms(limit)
            logs = [math.log(value / limit.ms) for value in values if value > 0]
            found = math.log(quantile / limit.ms) if quantile > 0 else math.nan
            locations.append(fmean(logs) if logs else found)
            tails.append(found - locations[-1] if logs else math.nan)
            spreads.append((float(np.var(logs)) if logs else 0.0, len(logs)))
        score = math.log(window.score) if window.score > 0 else math.nan
        self._windows.append(Window(row, at, max(window.requests, 1), score, locations, tails, spreads))

    def estimates(self, some: Array) -> Estimates:
        """Estimate `some` rows, in ascending order and including all measured ones, from the windows so far."""
        rows, at, requests = (np.array([w[i] for w in self._windows]) for i in range(3))
        features, places = self._features[some], np.searchsorted(some, rows)
        logs = np.array([[w.score, *w.locations, *w.tails] for w in self._windows]).T
        known, sampling = ~np.isnan(logs), self._sampling()
        share = 0.5 + 0.5 * np.median(requests) / requests  # of the noise, part of which is the requests' own
        figures = [
            Figure(features, places[k], share[k], var[k], sizes)
            for k, var, sizes in zip(known, sampling, self._sizes, strict=True)
        ]

        def inform() -> list[Information]:
            prior, basis = self._linear(rows, at - self._middle)
            apart = logs - prior
            return [f.inform(b[k], a[k]) for f, b, a, k in zip(figures, basis, apart, known, strict=True)]

        information = inform()
        for _ in range(6):  # Gauss-Newton iteration to the most probable theta
            step = np.clip(Shared(information, self._offset).moved, -1.5, 1.5)
            step[len(SD) :] = 0.0  # figures are linear in all but theta
            self._offset = self._offset + step
            information = inform()
            if np.abs(step).max() < 0.05:
                break
        if len(rows) <= _LEARN_ALWAYS or len(rows) >= _LEARN_GROWTH * self._learned:
            self._learned = len(rows)
            self._learn(figures, information)
        shared = Shared(information, self._offset)
        posterior = Posterior(figures, shared, *self._linear(some, np.zeros(len(some))))
        return self._estimates(some, posterior, known, np.unique(places), shared)

    @property
    def noise(self) -> float:
        """Standard deviation of the logarithm of a typical window's score."""
        return float(NOISES[self._sizes[0][1]])

    @property
    def _middle(self) -> float:
        """The middle of the search so far, as a share of the budget."""
        return max(window.at for window in self._windows) / 2

    def _estimates(self, rows: Array, posterior: Posterior, known: Array, measured: Array, shared: Shared) -> Estimates:
        """Return estimates in which each limited quantile is the sum of its location and its tail."""
        many = len(self._metrics)

        def summed(figures: Array) -> Array:
            for i in range(1, many):
                if not known[i].any():
                    figures[i] = -np.inf  # answers of one token have no TPOT
                elif known[many + i - 1].any():
                    figures[i] += figures[many + i - 1]
            return figures[:many]

        mean, variance = summed(posterior.mean.copy()), summed(posterior.variance.copy())
        apart = np.full(len(rows), np.nan)
        apart[measured] = posterior.apart(measured)
        drift = _DRIFT_SD * float(shared.moved[len(SD)])
        return Estimates(
            rows,
            mean,
            np.sqrt(np.maximum(variance, 0.0)),
            apart,
            lambda rng, count, rows: summed(posterior.draws(rng, count, rows)),
            limits=self._limits,
            measured=measured,
            drift=drift,
            middle=self._middle,
            noise=self.noise,
        )

    def _learn(self, figures: Sequence[Figure], information: list[Information]) -> None:
        """Climb to the most probable sizes of misfits and noise, one grid step at a time."""
        best, before = Shared(information, self._offset).logp, None
        while before != (before := [*self._sizes]):
            for i, figure in enumerate(figures):
                for misfit, noise in ((-1, 0), (1, 0), (0, -1), (0, 1), (1, -1), (-1, 1)):
                    was = figure.sizes
                    tried = was[0] + misfit, was[1] + noise
                    if not (0 <= tried[0] < len(MISFITS) and 0 <= tried[1] < len(NOISES)):
                        continue
                    figure.resize(tried)
                    changed = [*information[:i], figure.inform(figure.basis, figure.residual), *information[i + 1 :]]
                    if (found := Shared(changed, self._offset).logp) > best:
                        best, information[:], self._sizes[i] = found, changed, tried
                    else:
                        figure.resize(was)

    def _linear(self, rows: Array, at: Array) -> tuple[Array, Array]:
        """Return the figures at the current shared parameters (figure x row), and their derivatives per prior deviation
        of each parameter (figure x row x parameter), `at` shares of the budget after the middle of the windows."""
        limits, physical, theta = len(self._limits), len(self._metrics), len(SD)
        thetas = MEAN + SD * (self._offset[:theta] + np.vstack([np.zeros(theta), 1e-4 * np.eye(theta)]))
        found = self._signs * self._physics.predict(thetas, self._metrics, rows) + self._offsets
        prior = np.vstack([found[:, 0], np.full((limits, len(rows)), _TAIL)])
        basis = np.zeros((physical + limits, len(rows), theta + 1 + limits))
        basis[:physical, :, :theta] = (found[:, 1:] - found[:, :1]).transpose(0, 2, 1) / 1e-4
        basis[:physical, :, theta] = _DRIFT_SD * np.outer(self._drifts, at)
        for i in range(limits):
            basis[physical + i, :, theta + 1 + i] = _TAIL_SD
        return prior, basis

    def _sampling(self) -> Array:
        """Return the sampling variance of each figure (figure x window), for log-normal latencies.

        The spread of latencies is nearly the same in all windows, so windows of few requests borrow it from the others.
        Location and tail are independent (Basu's theorem).
        """
        many, limits = len(self._metrics), len(self._limits)
        found = np.zeros((many + limits, len(self._windows)))
        for i, limit in enumerate(self._limits):
            spread, n = np.array([w.spreads[i] for w in self._windows]).T
            usual = (_SPREAD_WORTH * _SPREAD**2 + (n * spread).sum()) / (_SPREAD_WORTH + np.maximum(n - 1, 0).sum())
            each = (_SPREAD_WORTH * usual + n * spread) / (_SPREAD_WORTH + np.maximum(n - 1, 0)) / np.maximum(n, 1)
            found[1 + i] = np.where(n > 0, each, 0.0)
            if 0 < limit.p < 1:
                density = NormalDist().pdf(NormalDist().inv_cdf(limit.p))
                found[many + i] = each * (limit.p * (1 - limit.p) / density**2 - 1)
        return found


def _correlation(a: Value, b: Value) -> float:
    if isinstance(a, int | float) and isinstance(b, int | float) and a > 0 and b > 0:
        return math.exp(-abs(math.log2(a / b)) / _OCTAVES)
    return float(a == b)
