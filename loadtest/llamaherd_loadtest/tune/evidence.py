"""What has been measured so far, and how far it can be trusted. All pure; noise is computed on logarithms.

The noise between windows of equal settings is the same for all settings, so it is pooled. A prior worth a few windows
keeps two windows that happen to agree from looking exact. It fades with more windows, so quiet hosts are recognised.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from statistics import NormalDist, fmean

from msgspec import Struct, field

from llamaherd_loadtest import limits
from llamaherd_loadtest.limits import Limit
from llamaherd_loadtest.quantiles import Judgement, judge_share
from llamaherd_loadtest.tune.settings import Settings

_PRIOR_WINDOWS = 4
_PRIOR_SCORE_NOISE = 0.10
_PRIOR_LATENCY_NOISE = 0.15
_MAX_INVALID = 3
_VALID_SINCE_FAILURE = 2  # valid windows after which a single failure is disregarded
_MAX_FAILED = 3  # failures without a valid window in between, as they may have one cause


class Load(Struct, frozen=True):
    """The load of a window: `rate` arrivals per second (Poisson, an open loop) if given, otherwise a closed loop with
    `concurrency` requests in flight; 0 means one per slot."""

    concurrency: int = 0
    rate: float = 0.0

    def __str__(self) -> str:
        if self.rate:
            return f"{self.rate:g} requests a second, arriving at random"
        return (
            f"{self.concurrency} requests in flight"
            if self.concurrency
            else "as many requests in flight as it has slots"
        )


SLOTS = Load()


class EngineSample(Struct, frozen=True):
    """/metrics, `at_s` seconds into the window's load: busy slots, KV cells in use and in total."""

    at_s: float
    slots_busy: int
    kv_used: int
    kv_cells: int


class Measurement(Struct, kw_only=True):
    """One window of one setting: throughputs, the observed figure of each limit in ms, raw latencies in ms.

    The search maximises `score`: see Objective.

    `fault` says why the figures do not count. "not launched: …" and "failed: …" are caused by the settings; "invalid:
    …" is missing data, for example because the client was too slow. `does_not_fit`: the server lacked the memory.
    `took_s` is the total time spent, including the change of settings and the warm-up; `request_s` is the duration of a
    request, also in an invalid window. `stalls` holds for each request the second of the window at which it ended and
    its largest gap in ms. `over` counts, for each limit, the requests above it and those that have the figure;
    `observed` is corrected for the low bias of quantiles of few requests. `valid_before` is the number of valid windows
    in the search before this one, `at` the share of its budget that was spent.
    """

    took_s: float
    valid_before: int = 0
    at: float = 0.0
    concurrency: int = 0
    fault: str = ""
    does_not_fit: bool = False
    score: float = 0.0
    tokens_per_s: float = 0.0
    requests_per_s: float = 0.0
    requests: int = 0
    errors: int = 0
    observed: dict[str, float] = field(default_factory=dict)
    over: dict[str, tuple[int, int]] = field(default_factory=dict)
    ttft_ms: list[float] = field(default_factory=list)
    tpot_ms: list[float] = field(default_factory=list)
    stalls: list[tuple[float, float]] = field(default_factory=list)
    engine: list[EngineSample] = field(default_factory=list)
    client_cpu: float = 0.0
    client_lag_ms: float = 0.0
    request_s: float = 0.0

    @property
    def invalid(self) -> bool:
        """Whether the window says nothing about the settings."""
        return self.fault.startswith("invalid")

    @property
    def failed(self) -> bool:
        """Whether the window shows that the settings do not work."""
        return bool(self.fault) and not self.invalid

    def latencies_ms(self, limit: Limit) -> list[float]:
        """The single latencies that `limit` bounds, if known."""
        return {"ttft": self.ttft_ms, "tpot": self.tpot_ms}.get(limit.metric, [])


class Record(Struct):
    """All windows of one setting, by phase. `ruled_out` says why it needs none; `predicted` is the score expected
    before its first window."""

    settings: Settings
    screening: list[Measurement] = field(default_factory=list)
    confirming: list[Measurement] = field(default_factory=list)
    ruled_out: str = ""
    predicted: float | None = None

    @property
    def fault(self) -> str:
        """Why the settings do not work, if so: they lack memory, or failed again after other windows were valid.

        One failure may have another cause, such as a restart by an operator. Missing data is not a failure.
        """
        failed = [m for m in self.all_windows if m.failed]
        repeated = len({m.valid_before for m in failed}) > 1 or len(failed) >= _MAX_FAILED
        return next((m.fault for m in failed if repeated or m.does_not_fit), self.ruled_out)

    @property
    def failed_once(self) -> bool:
        """Whether they failed and may fail again; two valid windows since then clear them."""
        since = itertools.takewhile(lambda m: not m.failed, reversed(self.all_windows))
        failed = any(m.failed for m in self.all_windows)
        return failed and not self.fault and len(_valid(since)) < _VALID_SINCE_FAILURE

    @property
    def failed_after(self) -> int:
        """The search's valid windows before the last failure; -1 without failures."""
        return max((m.valid_before for m in self.all_windows if m.failed), default=-1)

    @property
    def last_fault(self) -> str:
        """Why the last window without figures has none; empty if all have them."""
        return next((m.fault for m in reversed(self.all_windows) if m.fault), "")

    @property
    def unmeasurable(self) -> bool:
        """Whether so many windows were invalid that another attempt is a waste of time."""
        return not self.figures and sum(m.invalid for m in self.all_windows) >= _MAX_INVALID

    @property
    def all_windows(self) -> list[Measurement]:
        return [*self.screening, *self.confirming]

    @property
    def figures(self) -> bool:
        """Whether any window has figures."""
        return any(not m.fault for m in self.all_windows)

    @property
    def windows(self) -> list[Measurement]:
        """The windows that figures use: the confirming ones if there are any (a search's best one is partly lucky)."""
        return _valid(self.confirming) or _valid(self.screening)

    @property
    def confirmed(self) -> bool:
        """Whether the figures use confirming windows."""
        return bool(_valid(self.confirming))

    def log_score(self, drift: float = 0.0) -> float:
        """Mean logarithm of the score, less what a host that speeds up by `drift` over the budget adds to it."""
        return fmean(math.log(max(m.score, 1e-9)) - drift * m.at for m in self.windows)


def judge_errors(windows: Sequence[Measurement]) -> Judgement:
    """Judge whether at most 1 % of the requests of all windows fail."""
    errors = sum(m.errors for m in windows)
    return limits.judge_errors(errors, errors + sum(m.requests for m in windows))


class Drift(Struct, frozen=True):
    """The logarithm of the host's speed-up over the budget; `middle` is the share of it that figures refer to."""

    speed: float = 0.0
    middle: float = 0.5

    def slower(self, window: Measurement) -> float:
        """The factor by which drift lengthens the window's latencies."""
        return math.exp(-self.speed * (window.at - self.middle))


STEADY = Drift()


def judge_over(windows: Iterable[Measurement], limit: Limit, drift: Drift = STEADY) -> Judgement:
    """Judge whether the requests of all windows together, corrected for drift, keep a limit. UNRESOLVED if more exceed
    it than allowed but chance explains it; PASSES if there are no requests."""
    over, of = (sum(counts) for counts in zip((0, 0), *(_over(m, limit, drift) for m in windows), strict=True))
    if over <= (1 - limit.p) * of:
        return Judgement.PASSES
    misses = judge_share(over, of, 1 - limit.p) is Judgement.MISSES
    return Judgement.MISSES if misses else Judgement.UNRESOLVED


def _over(window: Measurement, limit: Limit, drift: Drift) -> tuple[int, int]:
    """Return how many requests exceed a limit without drift, unfinished ones included, and how many there are."""
    over, of = window.over.get(limit.name, (0, 0))
    values, bound_ms = window.latencies_ms(limit), limit.ms * drift.slower(window)
    return over + sum(value > bound_ms for value in values) - sum(value > limit.ms for value in values), of


class Noise(Struct, frozen=True):
    """Standard deviation of one window's logarithm, and its degrees of freedom."""

    sigma: float
    freedom: float

    def margin(self, confidence: float, weight: float) -> float:
        """One-sided half width for a mean whose variance is sigma² * weight (1/n for n windows)."""
        return student_t(confidence, self.freedom) * self.sigma * math.sqrt(weight)


def score_noise(records: Iterable[Record], drift: float = 0.0, guess: float = _PRIOR_SCORE_NOISE) -> Noise:
    """The noise of the score, apart from a `drift` over the budget."""
    return _pooled(records, lambda m: m.score * math.exp(-drift * m.at), guess)


def limit_noise(records: Iterable[Record], limit: Limit) -> Noise:
    """The noise of the figure that `limit` bounds."""
    return _pooled(records, lambda m: m.observed.get(limit.name, 0.0), _PRIOR_LATENCY_NOISE)


def _pooled(records: Iterable[Record], figure: Callable[[Measurement], float], prior: float) -> Noise:
    squares = freedom = 0.0
    for record in records:
        for windows in (record.screening, record.confirming):
            logs = [math.log(figure(m)) for m in _valid(windows) if figure(m) > 0]
            if len(logs) > 1:
                squares += _squares(logs)
                freedom += len(logs) - 1
    worth = _PRIOR_WINDOWS / (1 + freedom)
    freedom += worth
    return Noise(math.sqrt((squares + worth * prior**2) / freedom), max(freedom, _PRIOR_WINDOWS))


def _valid(windows: Iterable[Measurement]) -> list[Measurement]:
    return [m for m in windows if not m.fault]


def _squares(values: Sequence[float]) -> float:
    mean = fmean(values)
    return sum((v - mean) ** 2 for v in values)


def student_t(p: float, freedom: float) -> float:
    """Student's t quantile by the Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5); freedom at least 4."""
    z = NormalDist().inv_cdf(p)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
