"""Estimates every setting, measured or not, from all windows together.

Figures are logarithms: of the score, and of each limited latency over its limit. The true figure of a setting is

    physics(theta) + misfit of each knob's value + misfit of the setting itself

The physics is linearised about the most probable theta (Laplace's approximation). Misfits are Gaussian processes: an
exponential kernel, which allows cliffs, correlates numbers that are close on a logarithmic scale. A window adds noise,
and a drift of the host that is linear in time and common to speed and latencies. The sizes of misfits and noise are
those that make the windows most probable. Everything is then linear and Gaussian: Rasmussen and Williams, Gaussian
Processes for Machine Learning, 2.2 and 2.7.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from llamaherd_loadtest.limits import Limit
from llamaherd_loadtest.tune.evidence import Measurement
from llamaherd_loadtest.tune.objective import Objective
from llamaherd_loadtest.tune.physics import MEAN, SD, Array, Physics, Shape
from llamaherd_loadtest.tune.settings import Settings, Value

_KNOB_SD = {"parallel": 0.25}
_OTHER_KNOB_SD = 0.12
_SETTING_SD = 0.03
_LEVEL_SD = 0.5
_DRIFT_SD = 0.15  # over the budget
_OCTAVES = 3.0  # length scale of numeric knobs
_MISFITS = np.array([0.1, 0.2, 0.35, 0.6, 1.0, 1.6])  # factors of the deviations above
_NOISES = np.array([0.005, 0.01, 0.02, 0.03, 0.045, 0.065, 0.09, 0.13, 0.19, 0.27])
_USUAL_NOISE, _NOISE_SPREAD, _MISFIT_SPREAD = 0.06, 0.9, 1.5
_CANDIDATES = 64
_DRAWS = 64
_MISS_COST = 0.45  # cost of missing a limit, as a logarithm of the score
_EXCESS_COST = 4.0  # additional cost per unit of log excess, so that near misses rank above far ones
_NOTHING = np.empty(0)
CLEAR = 1.2  # deviations below a limit at which a few more windows are likely to show that it is kept
_NEAR_LIMIT = 0.04  # log distance from a limit at which a few windows cannot show that it is kept
_METRICS = {"ttft": "ttft", "tpot": "tpot", "itl": "tpot", "gap": "tpot", "e2e": "e2e"}


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
        self._theta = MEAN.copy()
        self._misfit, self._noise = [4] * len(self._metrics), [5] * len(self._metrics)
        self._rows: list[int] = []
        self._windows: list[tuple[float, Array, Array, float]] = []  # at, logarithms, sampling variance, requests
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
        figures = [window.score, *(window.observed.get(limit.name, 0.0) / limit.ms for limit in self._limits)]
        logs = np.array([math.log(figure) if figure > 0 else math.nan for figure in figures])
        sampling = np.array([0.0, *(_sampling(limit, window) for limit in self._limits)])
        self._rows.append(row)
        self._windows.append((at, logs, sampling, float(max(window.requests, 1))))

    def estimates(self, ruled_out: Iterable[int]) -> Estimates:
        """Estimate the measured settings and the most promising others from the windows so far."""
        at, logs, sampling, requests = (np.array(part) for part in zip(*self._windows, strict=True))
        seen = _Points(np.array(self._rows), at, logs.T, sampling.T)
        seen.share = 0.5 + 0.5 * np.median(requests) / requests  # of the noise, part of which is the requests' own
        jacobian = self._fit(seen)
        self._learn(seen, jacobian)
        inverse = self._inverse(seen, jacobian)
        alpha = inverse @ self._residual(seen, jacobian)
        rows = self._promising(seen, alpha, ruled_out)
        points, jacobian_points = _Points(rows, np.full(len(rows), at.mean())), self._jacobian(rows)
        across = self._covariance(seen, jacobian, points, jacobian_points)[seen.known]
        shift = jacobian_points @ ((MEAN - self._theta) / SD)
        mean = (self._figures(rows)[:, 0] + shift).ravel() + across.T @ alpha
        cov = self._covariance(points, jacobian_points, points, jacobian_points) - across.T @ inverse @ across
        drift = _DRIFT_SD**2 * float(np.outer(self._drifts, at).ravel()[seen.known] @ alpha)
        mean = np.where(seen.unseen, -math.inf, mean.reshape(len(self._signs), -1))
        return Estimates(rows, mean, cov, self._limits, drift=drift, noise=self.noise)

    @property
    def noise(self) -> float:
        """Standard deviation of the logarithm of a typical window's score."""
        return float(_NOISES[self._noise[0]])

    def _figures(self, rows: Any = slice(None), moved: float = 0.0) -> Array:
        """The physics' logarithms (figure x guess x row) at theta and `moved` prior deviations along each parameter."""
        thetas = self._theta + np.vstack([np.zeros(len(SD)), *([np.diag(moved * SD)] if moved else [])])
        figures: Array = self._signs * self._physics.predict(thetas, self._metrics, rows) + self._offsets
        return figures

    def _promising(self, seen: _Points, alpha: Array, ruled_out: Iterable[int]) -> Array:
        """Return the measured rows, and those with the highest means that are not ruled out."""
        flat = np.zeros(seen.known.shape)
        flat[seen.known] = alpha
        every = flat.reshape(seen.logs.shape)
        knobs = self._features @ (self._features[seen.rows].T @ every.T) * _MISFITS[self._misfit] ** 2
        score, *excess = np.where(seen.unseen, -math.inf, self._figures()[:, 0] + knobs.T)
        worth = score - _EXCESS_COST * sum((np.maximum(0.0, e) for e in excess), np.zeros_like(score))
        worth[[*ruled_out]] = -np.inf
        measured = np.unique(seen.rows)
        worth[measured] = -np.inf
        others = np.argsort(-worth)[:_CANDIDATES]
        rows: Array = np.append(measured, others[np.isfinite(worth[others])])
        return rows

    def _jacobian(self, rows: Any) -> Array:
        """Of the figures at theta, per standard deviation of the prior: figure x row x parameter."""
        found = self._figures(rows, 1e-4)
        jacobian: Array = (found[:, 1:] - found[:, :1]).transpose(0, 2, 1) / 1e-4
        return jacobian

    def _residual(self, seen: _Points, jacobian: Array) -> Array:
        shift = jacobian @ ((MEAN - self._theta) / SD)
        residual: Array = (seen.logs - self._figures(seen.rows)[:, 0] - shift).ravel()[seen.known]
        return residual

    def _parts(self, one: _Points, jacobian: Array, other: _Points, jacobian_other: Array) -> tuple[Array, Array]:
        """Return the covariance between two sets of figures from theta and drift, and from misfits of unit size."""
        flat, flat_other = (j.reshape(-1, len(SD)) for j in (jacobian, jacobian_other))
        drift, drift_other = (_DRIFT_SD * np.outer(self._drifts, s.at).ravel() for s in (one, other))
        correlation = self._features[one.rows] @ self._features[other.rows].T
        correlation = correlation + _SETTING_SD**2 * (one.rows[:, None] == other.rows)
        return flat @ flat_other.T + np.outer(drift, drift_other), np.kron(np.eye(len(self._signs)), correlation)

    def _covariance(self, one: _Points, jacobian: Array, other: _Points, jacobian_other: Array) -> Array:
        theta, misfit = self._parts(one, jacobian, other, jacobian_other)
        scale, scale_other = (np.repeat(_MISFITS[self._misfit], len(s.rows)) for s in (one, other))
        covariance: Array = theta + np.outer(scale, scale_other) * misfit
        return covariance

    def _noise_variance(self, seen: _Points, noise: Sequence[int]) -> Array:
        return (np.outer(_NOISES[[*noise]] ** 2, seen.share) + seen.sampling).ravel()[seen.known]

    def _inverse(self, seen: _Points, jacobian: Array) -> Array:
        """Return the inverse covariance of all measured figures."""
        cov = self._covariance(seen, jacobian, seen, jacobian)[np.ix_(seen.known, seen.known)]
        inverse: Array = np.linalg.inv(cov + np.diag(self._noise_variance(seen, self._noise)))
        return inverse

    def _fit(self, seen: _Points) -> Array:
        """Move theta to its most probable value by Gauss-Newton iteration; return the jacobian there."""
        for _ in range(6):
            jacobian = self._jacobian(seen.rows)
            alpha = self._inverse(seen, jacobian) @ self._residual(seen, jacobian)
            to = jacobian.reshape(-1, len(SD))[seen.known].T @ alpha
            step = np.clip(to - (self._theta - MEAN) / SD, -1.5, 1.5)
            self._theta = self._theta + SD * step
            if np.abs(step).max() < 0.05:
                break
        return self._jacobian(seen.rows)

    def _learn(self, seen: _Points, jacobian: Array) -> None:
        """Climb to the most probable sizes of misfits and noise, one grid step at a time."""
        known = seen.known
        theta, misfits = (part[np.ix_(known, known)] for part in self._parts(seen, jacobian, seen, jacobian))
        residual, many = self._residual(seen, jacobian), len(self._metrics)

        def logp(sizes: Sequence[int]) -> float:
            misfit, noise = _MISFITS[[*sizes[:many]]], _NOISES[[*sizes[many:]]]
            scale = np.repeat(misfit, len(seen.rows))[known]
            cov = theta + np.outer(scale, scale) * misfits + np.diag(self._noise_variance(seen, sizes[many:]))
            root = np.linalg.cholesky(cov)
            fit = np.linalg.solve(root, residual)
            prior = (np.log(noise / _USUAL_NOISE) / _NOISE_SPREAD) ** 2 + (np.log(misfit) / _MISFIT_SPREAD) ** 2
            return float(-0.5 * (fit @ fit + prior.sum()) - np.log(np.diag(root)).sum())

        sizes, before = [*self._misfit, *self._noise], list[int]()
        best = logp(sizes)
        while sizes != before:
            before = sizes
            for place in range(len(sizes)):
                for step in (-1, 1):
                    tried = [*sizes]
                    tried[place] = min(max(tried[place] + step, 0), (_MISFITS if place < many else _NOISES).size - 1)
                    if tried != sizes and (found := logp(tried)) > best:
                        best, sizes = found, tried
        self._misfit, self._noise = sizes[:many], sizes[many:]


class _Points:
    """Rows of the space at times of the budget; for windows, also their figures (figure x window) and noise."""

    def __init__(self, rows: Array, at: Array, logs: Array = _NOTHING, sampling: Array = _NOTHING) -> None:
        self.rows, self.at, self.logs, self.sampling, self.share = rows, at, logs, sampling, at * 0
        self.known = ~np.isnan(logs).ravel()
        self.unseen = np.isnan(logs).all(axis=-1, keepdims=True)  # one token has no TPOT


class Estimates:
    """The log score and, for each limit, the logarithm of its figure over the limit, for some `rows` of the space.

    `drift` is the logarithm of the host's speed-up over the budget, `noise` that of a window.
    """

    def __init__(
        self, rows: Array, mean: Array, cov: Array, limits: Sequence[Limit], *, drift: float, noise: float
    ) -> None:
        self._place = {int(row): place for place, row in enumerate(rows)}
        self._mean, self._cov, self._limits, self.drift, self.noise = mean, cov, limits, drift, noise
        self._sd = np.sqrt(np.maximum(np.diag(cov), 0.0)).reshape(mean.shape)

    def score(self, row: int) -> float | None:
        """The score of a promising or measured row."""
        place = self._place.get(row)
        return None if place is None else math.exp(float(self._mean[0, place]))

    def gain(self, row: int) -> tuple[float, float]:
        """Mean and standard deviation of a measured row's log score minus that of row 0, the current settings."""
        one, other = self._place[row], self._place[0]
        variance = self._cov[one, one] + self._cov[other, other] - 2 * self._cov[one, other]
        return float(self._mean[0, one] - self._mean[0, other]), math.sqrt(max(variance, 0.0))

    def risk(self, row: int) -> float:
        """The probability that a measured row misses a limit."""
        return 1 - math.prod(NormalDist().cdf(-mean / max(sd, 1e-9)) for _, mean, sd in self.excess(row))

    def excess(self, row: int) -> list[tuple[Limit, float, float]]:
        """Each limit with the mean and the standard deviation of a measured row's log figure over it."""
        at = self._place[row]
        return [(lim, float(self._mean[i, at]), float(self._sd[i, at])) for i, lim in enumerate(self._limits, 1)]

    def next(self, ruled_out: Iterable[int], rng: np.random.Generator) -> int | None:
        """Return the row to measure next: of the best rows in two posterior draws, the less well known.

        Top-two Thompson sampling (Russo, "Simple Bayesian Algorithms for Best-Arm Identification", 2016): a second look
        at a setting that is surely good is worth less than a first look at one that may beat it.
        """
        worth, rows = self._worth(ruled_out, rng)
        if not rows:
            return None
        bests = np.argmax(worth, axis=1)
        rivals = bests[bests != bests[0]]
        return rows[int(max((bests[0], *rivals[:1]), key=lambda place: worth[:, place].std()))]

    def regret(self, chosen: int, ruled_out: Iterable[int], rng: np.random.Generator) -> float:
        """Return the expected loss of `chosen` against the best row, in log score, averaged over the draws."""
        worth, rows = self._worth(ruled_out, rng)
        return float((worth.max(axis=1) - worth[:, rows.index(chosen)]).mean())

    def best(self, count: int, ruled_out: Iterable[int], doubt: float = 0.5) -> list[int]:
        """Return the `count` best rows; those over a limit or within `doubt` deviations of it are penalised."""
        score = self._mean[0] - _EXCESS_COST * np.maximum(0.0, self._mean[1:] + doubt * self._sd[1:]).sum(axis=0)
        out = {*ruled_out}
        rows = sorted((row for row in self._place if row not in out), key=lambda row: -score[self._place[row]])
        return rows[:count]

    def _worth(self, ruled_out: Iterable[int], rng: np.random.Generator) -> tuple[Array, list[int]]:
        """Return draws of each row's value (draw x row) and the rows; misses and near misses are penalised."""
        out = {*ruled_out}
        rows = [row for row in self._place if row not in out]
        places = [self._place[row] for row in rows]
        flat = np.concatenate([i * self._mean.shape[1] + np.array(places, int) for i in range(len(self._mean))])
        cov = self._cov[np.ix_(flat, flat)]
        root = np.linalg.cholesky(cov + (1e-9 + 1e-8 * np.trace(cov)) * np.eye(len(flat)))
        drawn = self._mean.ravel()[flat] + rng.standard_normal((_DRAWS, len(flat))) @ root.T
        score, *excess = np.split(drawn, len(self._mean), axis=1)
        return score - sum(
            (np.where(e > -_NEAR_LIMIT, _MISS_COST + _EXCESS_COST * e, 0.0) for e in excess), np.zeros_like(score)
        ), rows


def _sampling(limit: Limit, window: Measurement) -> float:
    """Variance of the logarithm of a quantile of so few requests, if their latencies are known and log-normal."""
    values = {"ttft": window.ttft_ms, "tpot": window.tpot_ms}.get(limit.metric, [])
    if len(values) < 2 or not 0 < limit.p < 1:
        return 0.0
    z, spread = NormalDist().inv_cdf(limit.p), float(np.var(np.log(values), ddof=1))
    return spread * limit.p * (1 - limit.p) / NormalDist().pdf(z) ** 2 / len(values)


def _correlation(a: Value, b: Value) -> float:
    if isinstance(a, int | float) and isinstance(b, int | float) and a > 0 and b > 0:
        return math.exp(-abs(math.log2(a / b)) / _OCTAVES)
    return float(a == b)
