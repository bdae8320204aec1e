"""The choice: only a confirmed gain that stands out of the noise, within all limits, replaces the current settings."""

from __future__ import annotations

import math
from collections.abc import Sequence

from msgspec import Struct

from llamaherd_loadtest.quantiles import Judgement
from llamaherd_loadtest.tune.evidence import Noise, Record
from llamaherd_loadtest.tune.objective import TOKENS, Objective
from llamaherd_loadtest.tune.settings import LLAMA_CPP_DEFAULTS, key

MIN_GAIN = math.log(1.02)  # smaller gains are not worth a change
_TIE = math.log(1.003)  # a wider one gives speed away on top of what the noise takes
_ERROR = 0.025  # the chance of a change for nothing, shared by all finalists


class Contender(Struct, frozen=True):
    """A setting that was confirmed: its record, its believed log score, and whether it keeps the limits."""

    record: Record
    log_score: float
    judgement: Judgement


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


class _Comparison(Struct, frozen=True):
    """A finalist beside the current settings, in logarithms of the score; of confirming windows alone."""

    contender: Contender
    gain: float
    margin: float


def choose(current: Contender, finalists: Sequence[Contender], noise: Noise, objective: Objective = TOKENS) -> Choice:
    """Choose among the confirmed finalists and the current settings, given the noise of the score.

    A finalist must keep every limit beyond the noise, and beat the current settings beyond it; where those miss a
    limit, keeping them is enough. Ties go to the larger context per slot, then to the fewer non-default settings.
    """
    rescue = current.judgement is Judgement.MISSES
    passing = [
        _compare(f, current, noise, 1 - _ERROR / len(finalists)) for f in finalists if f.judgement is Judgement.PASSES
    ]
    clear = [c for c in passing if rescue or c.gain - c.margin > MIN_GAIN]
    if not clear:
        return Choice(record=current.record, change=False, reason=_why_keep(finalists, passing, objective))
    fastest = max(c.contender.log_score for c in clear)
    best = min((c for c in clear if fastest - c.contender.log_score < _TIE), key=_preference)
    return Choice(
        record=best.contender.record,
        change=True,
        gain=math.expm1(best.gain),
        margin=math.expm1(best.margin),
        reason="the current settings miss a limit" if rescue else "the gain stands out of the noise",
    )


def _compare(contender: Contender, current: Contender, noise: Noise, confidence: float) -> _Comparison:
    ours, theirs = contender.record, current.record
    weight = 1 / len(ours.windows) + 1 / len(theirs.windows)
    return _Comparison(contender, ours.log_score - theirs.log_score, noise.margin(confidence, weight))


def _preference(comparison: _Comparison) -> tuple[float, int, str]:
    settings = comparison.contender.record.settings
    context = settings.get("ctx_per_slot", 0)
    changed = sum(settings[name] != value for name, value in LLAMA_CPP_DEFAULTS.items() if name in settings)
    return -float(context), changed, key(settings)


def _why_keep(finalists: Sequence[Contender], passing: Sequence[_Comparison], objective: Objective) -> str:
    if not finalists:
        return "no other settings could be measured"
    if not passing:
        return "no other settings keep the limits beyond the noise"
    best = max(passing, key=lambda c: c.gain)
    gain = objective.in_words(math.expm1(best.gain), math.expm1(best.margin))
    return f"the best other settings measured {gain}, which is no clear gain"
