"""The model of a host: what all windows together say of each setting, measured or not.

What windows show are logarithms: of the score; of each limited latency, where it lies and, apart, how far above that
its quantile is (see Window). A setting's true ones are

    physics(theta) + misfit of each knob's value + misfit of the setting itself

with theta linear about its most probable value (Laplace's approximation), and misfits Gaussian processes, for each
figure apart: numbers are alike where they are near on a logarithmic scale, by an exponential kernel, which allows
cliffs. The height of a quantile has a level in the place of the physics. A window adds noise, and a drift of the host
that is linear in time and common to speed and latencies. How large misfits and noise are is what makes the windows most
probable. Everything is then linear and Gaussian: see posterior.
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
_TAIL, _TAIL_SD = 0.4, 0.4  # a quantile's logarithm above the mean one
_OCTAVES = 3.0  # length scale of numeric knobs
_SPREAD, _SPREAD_WORTH = 0.3, 10.0  # of the logarithms of a window's latencies, and how many requests say so
_LEARN, _LEARN_ALWAYS = 1.25, 12  # times the windows, and how many: sizes are learned anew
_METRICS = {"ttft": "ttft", "tpot": "tpot", "itl": "tpot", "gap": "tpot", "e2e": "e2e"}


class Window(NamedTuple):
    """What a window says: a row of the space, the share of the budget at which it began, requests; the logarithm of
    its score; of each limit, that of its latency over the limit, how far above that the limited quantile is (NaN where
    single latencies are not known: the former is then the quantile's), and the variance and number of the latencies."""

    row: int
    at: float
    requests: int
    score: float
    places: list[float]
    tails: list[float]
    spreads: list[tuple[float, int]]


class Model:
    """Gathers windows, and estimates from them."""

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
        self._offset = np.zeros(len(SD) + 1 + len(limits))  # of theta, the drift and the tails' levels, in deviations
        self._sizes = [(4, 5)] * (len(self._metrics) + len(limits))
        self._windows: list[Window] = []
        self._learned = 0
        self.space(settings)

    def space(self, settings: Sequence[Settings]) -> None:
        """Take these in place of those before, whose rows stay what they were."""
        self._physics = Physics(settings, self._shape)
        columns = [np.full((len(settings), 1), _LEVEL_SD)]
        for knob in settings[0]:
            values = list(dict.fromkeys(s[knob] for s in settings))
            if len(values) > 1:
                alike = np.array([[_alike(a, b) for b in values] for a in values])
                root = np.linalg.cholesky(alike + 1e-9 * np.eye(len(values)))
                place = {value: i for i, value in enumerate(values)}
                columns.append(_KNOB_SD.get(knob, _OTHER_KNOB_SD) * root[[place[s[knob]] for s in settings]])
        self._features = np.hstack(columns)

    def add(self, row: int, window: Measurement, at: float) -> None:
        """A window without a fault, that began at this share of the budget."""
        places, tails, spreads = [], [], []
        for limit in self._limits:
            quantile, values = window.observed.get(limit.name, 0.0), window.latencies_ms(limit)
            logs = [math.log(value / limit.ms) for value in values if value > 0]
            found = math.log(quantile / limit.ms) if quantile > 0 else math.nan
            places.append(fmean(logs) if logs else found)
            tails.append(found - places[-1] if logs else math.nan)
            spreads.append((float(np.var(logs)) if logs else 0.0, len(logs)))
        score = math.log(window.score) if window.score > 0 else math.nan
        self._windows.append(Window(row, at, max(window.requests, 1), score, places, tails, spreads))

    def estimates(self, looked_at: Array) -> Estimates:
        """What the windows so far say of some rows, ascending, those of the windows among them."""
        rows, at, requests = (np.array([w[i] for w in self._windows]) for i in range(3))
        features, places = self._features[looked_at], np.searchsorted(looked_at, rows)
        logs = np.array([[w.score, *w.places, *w.tails] for w in self._windows]).T
        known, sampling = ~np.isnan(logs), self._sampling()
        share = 0.5 + 0.5 * np.median(requests) / requests  # of the noise: part of it is the requests' own
        figures = [
            Figure(features, places[k], share[k], var[k], sizes)
            for k, var, sizes in zip(known, sampling, self._sizes, strict=True)
        ]

        def inform() -> list[Information]:
            prior, basis = self._linear(rows, at - self._middle)
            apart = logs - prior
            return [f.inform(b[k], a[k]) for f, b, a, k in zip(figures, basis, apart, known, strict=True)]

        information = inform()
        for _ in range(6):  # Gauss and Newton's iteration to the most probable theta
            step = np.clip(Shared(information, self._offset).moved, -1.5, 1.5)
            step[len(SD) :] = 0.0  # all figures are linear in the others
            self._offset = self._offset + step
            information = inform()
            if np.abs(step).max() < 0.05:
                break
        if len(rows) <= _LEARN_ALWAYS or len(rows) >= _LEARN * self._learned:
            self._learned = len(rows)
            self._learn(figures, information)
        shared = Shared(information, self._offset)
        posterior = Posterior(figures, shared, *self._linear(looked_at, np.zeros(len(looked_at))))
        return self._estimates(looked_at, posterior, known, np.unique(places), shared)

    @property
    def noise(self) -> float:
        """Standard deviation of the logarithm of a usual window's score."""
        return float(NOISES[self._sizes[0][1]])

    @property
    def _middle(self) -> float:
        """The share of the budget in the middle of the time so far."""
        return max(window.at for window in self._windows) / 2

    def _estimates(self, rows: Array, posterior: Posterior, known: Array, measured: Array, shared: Shared) -> Estimates:
        """Of the limited quantiles, which are where latencies lie and how far above that, together."""
        many = len(self._metrics)

        def together(figures: Array) -> Array:
            for i in range(1, many):
                if not known[i].any():
                    figures[i] = -np.inf  # one token has no TPOT
                elif known[many + i - 1].any():
                    figures[i] += figures[many + i - 1]
            return figures[:many]

        mean, variance = together(posterior.mean.copy()), together(posterior.variance.copy())
        apart = np.full(len(rows), np.nan)
        apart[measured] = posterior.apart(measured)
        drift = _DRIFT_SD * float(shared.moved[len(SD)])
        return Estimates(
            rows,
            mean,
            np.sqrt(np.maximum(variance, 0.0)),
            apart,
            lambda rng, count, rows: together(posterior.draws(rng, count, rows)),
            limits=self._limits,
            measured=measured,
            drift=drift,
            middle=self._middle,
            noise=self.noise,
        )

    def _learn(self, figures: Sequence[Figure], information: list[Information]) -> None:
        """Climb to the most probable size of misfits and noise, one step of a grid at a time."""
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
        """The prior's figures of rows (figure x row) about the shared parameters as they are, `at` shares of the budget
        after the middle of the windows; and how these change them, for a deviation each: figure x row x parameter."""
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
        """Variances of each figure of each window that its own requests give it, of latencies that are log-normal.

        How far latencies of one window spread is nearly the same in others: windows of few requests take it from them.
        Mean and quantile less mean are independent (Basu's theorem).
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


def _alike(a: Value, b: Value) -> float:
    if isinstance(a, int | float) and isinstance(b, int | float) and a > 0 and b > 0:
        return math.exp(-abs(math.log2(a / b)) / _OCTAVES)
    return float(a == b)
