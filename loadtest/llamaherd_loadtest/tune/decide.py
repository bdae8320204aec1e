"""The choice: only a confirmed gain beyond the noise, within all limits, replaces the current settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from msgspec import Struct

from llamaherd_loadtest.quantiles import Judgement
from llamaherd_loadtest.tune.evidence import Noise, Record
from llamaherd_loadtest.tune.objective import TOKENS, Objective
from llamaherd_loadtest.tune.settings import LLAMA_CPP_DEFAULTS, key

MIN_GAIN = math.log(1.02)  # smaller gains are not worth a change
_TIE = math.log(1.003)  # gains this close are equal; a wider tie would give away speed on top of the noise
_CONFIDENCE = 0.98  # confidence in the gain of the confirming windows alone
_RISK_COST = 1.0  # log score that a risk of 1 of missing a limit costs: risky settings must be that much faster
_SURE_MISS = 0.99  # risk above which current settings miss a limit by more than bad luck
_ERROR = 0.025  # probability of a change without a gain, shared by all finalists


class Candidate(Struct, frozen=True):
    """A confirmed setting: its record, whether it keeps the limits, the mean and standard deviation of its estimated
    gain over the current ones (a logarithm), and `risk`, the probability that it misses a limit."""

    record: Record
    judgement: Judgement
    gain: float = 0.0
    sd: float = 0.0
    risk: float = 0.0

    @property
    def worth(self) -> float:
        """The gain less the cost of possibly missing a limit."""
        return self.gain - _RISK_COST * self.risk


class Choice(Struct, frozen=True, kw_only=True):
    """The settings to run, and the reason. `gain` over the current settings and its half interval `margin` are shares.

    `measured` is false if every window of the current settings was invalid, so that nothing was compared.
    """

    record: Record
    change: bool
    reason: str
    gain: float = 0.0
    margin: float = 0.0
    measured: bool = True


def choose(
    current: Candidate, finalists: Sequence[Candidate], noise: Noise, objective: Objective = TOKENS, drift: float = 0.0
) -> Choice:
    """Choose among the confirmed finalists and the current settings, for a host with this score `noise` and `drift`.

    A finalist must keep every limit beyond the noise and beat the current settings beyond it, and its confirming
    windows must show a gain by themselves, since they did not help to select it. If the current settings surely miss a
    limit, keeping all limits is enough. Ties go to the larger context per slot, then to fewer non-default settings.
    """
    rescue = current.judgement is Judgement.MISSES and current.risk > _SURE_MISS
    passing = [f for f in finalists if f.judgement is Judgement.PASSES]
    margin = NormalDist().inv_cdf(1 - _ERROR / max(len(finalists), 1))
    clear = [
        f
        for f in passing
        if rescue or (f.gain - margin * f.sd > MIN_GAIN and _confirmed(f.record, current.record, noise, drift))
    ]
    if not clear:
        return Choice(record=current.record, change=False, reason=_why_keep(finalists, passing, objective, margin))
    fastest = max(c.worth for c in clear)
    best = min((c for c in clear if fastest - c.worth < _TIE), key=_preference)
    return Choice(
        record=best.record,
        change=True,
        gain=math.expm1(best.gain),
        margin=math.expm1(margin * best.sd),
        reason="the current settings miss a limit" if rescue else "the gain exceeds the noise",
    )


def _confirmed(record: Record, current: Record, noise: Noise, drift: float) -> bool:
    """Return whether the confirming windows alone show a gain."""
    gain = record.log_score(drift) - current.log_score(drift)
    return gain - noise.margin(_CONFIDENCE, 1 / len(record.windows) + 1 / len(current.windows)) > MIN_GAIN


def _preference(candidate: Candidate) -> tuple[float, int, str]:
    settings = candidate.record.settings
    context = settings.get("ctx_per_slot", 0)
    changed = sum(settings[name] != value for name, value in LLAMA_CPP_DEFAULTS.items() if name in settings)
    return -float(context), changed, key(settings)


def _why_keep(finalists: Sequence[Candidate], passing: Sequence[Candidate], objective: Objective, margin: float) -> str:
    if not finalists:
        return "no other settings could be measured"
    if not passing:
        return "no other settings keep the limits beyond the noise"
    best = max(passing, key=lambda c: c.gain)
    gain = objective.in_words(math.expm1(best.gain), math.expm1(margin * best.sd))
    return f"the best other settings measured {gain}, which is not a clear gain"
