"""The check in service: whether the deployed settings that a search chose perform better than the previous ones."""

from __future__ import annotations

import math
import secrets

from llamaherd_loadtest.quantiles import Judgement
from llamaherd_loadtest.tune.applier import AdminApplier
from llamaherd_loadtest.tune.evidence import Record, score_noise
from llamaherd_loadtest.tune.judge import judge_alone
from llamaherd_loadtest.tune.live import LiveBench
from llamaherd_loadtest.tune.options import Options
from llamaherd_loadtest.tune.settings import Settings, difference, label
from llamaherd_loadtest.tune.verdict import Row, Verdict, read_verdict, write_verdict

_WINDOWS = 3
_TRIES = 6  # at most, including invalid windows
_WINDOW_S = 10.0  # at least, if the search's windows were shorter
_CONFIDENCE = 0.95


class _ReadOnlyApplier(AdminApplier):
    """Changes nothing, so that the deployed settings are measured."""

    def apply(self, settings: Settings) -> None:
        """Raises ValueError if the server has other settings."""
        current = self.state().settings
        if other := difference({name: current.get(name, "none") for name in settings}, settings):
            raise ValueError(f"the server does not have the chosen settings: {other}")


def measure_again(options: Options) -> tuple[bool, str]:
    """Measure the current settings; return whether they beat those that the verdict replaced, and a sentence.

    If the previous ones missed a limit, keeping all is enough. Writes the sentence into the verdict's provenance; if
    they are not better, changes the verdict to keep the previous ones. Raises ServerUnusable, and ValueError if the
    server has other settings than the verdict chose.
    """
    path = options.out / "verdict.json"
    verdict, applier = read_verdict(path), _ReadOnlyApplier(options.admin_url, options.admin_key, options.target.ca)
    applier.apply(verdict.chosen)
    seed = secrets.randbits(24) if options.seed is None else options.seed
    bench, record = LiveBench(options, applier, seed), Record(verdict.chosen)
    window_s = max(_WINDOW_S, float(str(verdict.provenance.get("window_s", 0))))
    for i in range(_TRIES):
        if len(record.windows) < _WINDOWS and not record.fault:
            record.confirming.append(bench.measure(verdict.chosen, window_s, seed + i, options.load))
    better, sentence = _compare(options, record, next(r for r in verdict.table if r.settings == verdict.current))
    verdict.provenance["in_service"] = sentence
    if not better:
        _roll_back(verdict, sentence)
    write_verdict(path, verdict)
    return better, sentence


def _roll_back(verdict: Verdict, why: str) -> None:
    for row in verdict.table:
        if row.settings == verdict.chosen:
            row.verdict = "not confirmed in service"
    changed = difference(verdict.current, verdict.chosen)
    verdict.sentence = f"Keep {label(verdict.current)}: the search chose {changed}, but {why}."
    verdict.verdict, verdict.chosen = "keep", verdict.current


def _compare(options: Options, record: Record, before: Row) -> tuple[bool, str]:
    if record.fault or not record.figures:
        return False, f"in service: {record.fault or record.last_fault}"
    if judge_alone(record, options.limits) is Judgement.MISSES:
        return False, "in service these settings miss a limit"
    gain = record.log_score() - math.log(before.score)
    margin = score_noise([record]).margin(_CONFIDENCE, 1 / len(record.windows) + 1 / max(before.windows, 1))
    words = options.objective.in_words(math.expm1(gain), math.expm1(margin))
    if "misses" in before.verdict:
        return True, f"in service these settings keep the limits; compared with the previous ones: {words}"
    return gain > 0, f"in service, compared with the previous settings: {words}"
