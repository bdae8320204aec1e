"""The choice: only a confirmed gain that stands out of the noise, within all limits, replaces the current settings."""

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
_TIE = math.log(1.003)  # a wider one gives speed away on top of what the noise takes
_CONFIDENCE = 0.98  # and that its confirming windows alone are no chance
_RISK_COST = 1.0  # as a logarithm of the score: settings that may miss a limit have to be that much faster
_ERROR = 0.025  # the chance of a change for nothing, shared by all finalists


class Contender(Struct, frozen=True):
    """A setting that was confirmed: its record, whether it keeps the limits, and its estimated gain over the current
    ones, a logarithm, with its standard deviation; `risk` is the chance that it misses a limit."""

    record: Record
    judgement: Judgement
    gain: float = 0.0
    sd: float = 0.0
    risk: float = 0.0

    @property
    def worth(self) -> float:
        """The gain, less what the chance of missing a limit costs."""
        return self.gain - _RISK_COST * self.risk


class Choice(Struct, frozen=True, kw_only=True):
    """What to run, and why. `gain` over the current settings, and its half interval `margin`, are shares.

    `measured` is false where each window of the current settings was spoiled, so that nothing was compared.
    """

    record: Record
    change: bool
    reason: str
    gain: float = 0.0
    margin: float = 0.0
    measured: bool = True


def choose(
    current: Contender, finalists: Sequence[Contender], noise: Noise, objective: Objective = TOKENS, drift: float = 0.0
) -> Choice:
    """Choose among the confirmed finalists and the current settings, on a host whose score has `noise` and a `drift`.

    A finalist must keep every limit beyond the noise and beat the current settings beyond it, and the windows that
    confirm it must show a gain by themselves: they were not what it was picked for. Where the current settings miss a
    limit, keeping them is enough. Ties go to the larger context per slot, then to the fewer non-default settings.
    """
    rescue = current.judgement is Judgement.MISSES
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
        reason="the current settings miss a limit" if rescue else "the gain stands out of the noise",
    )


def _confirmed(record: Record, current: Record, noise: Noise, drift: float) -> bool:
    """Whether the confirming windows alone show a gain."""
    gain = record.log_score(drift) - current.log_score(drift)
    return gain - noise.margin(_CONFIDENCE, 1 / len(record.windows) + 1 / len(current.windows)) > MIN_GAIN


def _preference(contender: Contender) -> tuple[float, int, str]:
    settings = contender.record.settings
    context = settings.get("ctx_per_slot", 0)
    changed = sum(settings[name] != value for name, value in LLAMA_CPP_DEFAULTS.items() if name in settings)
    return -float(context), changed, key(settings)


def _why_keep(finalists: Sequence[Contender], passing: Sequence[Contender], objective: Objective, margin: float) -> str:
    if not finalists:
        return "no other settings could be measured"
    if not passing:
        return "no other settings keep the limits beyond the noise"
    best = max(passing, key=lambda c: c.gain)
    gain = objective.in_words(math.expm1(best.gain), math.expm1(margin * best.sd))
    return f"the best other settings measured {gain}, which is no clear gain"
