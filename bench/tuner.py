"""The tuner's decisions beside Optuna's TPE and plain random search: the same simulated servers, the same time.

Every optimiser measures the current settings first. The peers then choose the best mean of the windows that kept the
limits; they have no rule of their own for noise. Shares over BENCH_SEEDS servers (200 if not set).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from statistics import fmean

import optuna
from msgspec import Struct

from bench.table import Result, metric
from llamaherd_loadtest.tune.evidence import Measurement
from llamaherd_loadtest.tune.settings import Settings, key
from tests.loadtest.simulated import CURRENT, GRID_S, KNOBS, LIMITS, SimulatedServer, search

SEEDS = int(os.environ.get("BENCH_SEEDS", "200"))
BUDGET_S = 0.25 * GRID_S
WINDOW_S = 30.0  # as long as the tuner's own at this budget


class Outcome(Struct, frozen=True):
    """What one optimiser did on one server; `kept` counts the two servers where nothing is better than the current."""

    within_5_percent: bool
    breaks_limits: bool
    kept: int
    spent_s: float


Optimiser = Callable[[SimulatedServer, Settings, int], tuple[Settings, float]]  # to (choice, seconds spent)


def run() -> Result:
    with ProcessPoolExecutor() as pool:
        outcomes = {name: list(pool.map(outcome, [name] * SEEDS, range(SEEDS), chunksize=4)) for name in OPTIMISERS}
    shares = {
        "within_5_percent": {name: [fmean(o.within_5_percent for o in all_)] for name, all_ in outcomes.items()},
        "breaks_limits": {name: [fmean(o.breaks_limits for o in all_)] for name, all_ in outcomes.items()},
        "keeps_current": {name: [fmean(o.kept / 2 for o in all_)] for name, all_ in outcomes.items()},
        "time_share": {name: [max(o.spent_s for o in all_) / GRID_S] for name, all_ in outcomes.items()},
    }
    return {f"simulated_{SEEDS}": {name: metric(rounds) for name, rounds in shares.items()}}


def outcome(name: str, seed: int) -> Outcome:
    optimise = OPTIMISERS[name]
    server = SimulatedServer(seed)
    choice, spent_s = optimise(server, CURRENT, seed)
    share = server.truth(choice)[0] / server.truth(server.best())[0]
    flat, topped = SimulatedServer(seed, flat=True), SimulatedServer(seed)
    kept = [optimise(s, current, seed)[0] == current for s, current in ((flat, CURRENT), (topped, topped.best()))]
    return Outcome(
        within_5_percent=share >= 0.95 and server.passes(choice),
        breaks_limits=choice != CURRENT and not server.passes(choice),
        kept=sum(kept),
        spent_s=spent_s,
    )


def ours(server: SimulatedServer, current: Settings, seed: int) -> tuple[Settings, float]:
    tried = search(server, current, budget_s=BUDGET_S, seed=seed)
    return tried.run().record.settings, tried.spent_s


def peer(sampler: Callable[[int], optuna.samplers.BaseSampler]) -> Optimiser:
    def optimise(server: SimulatedServer, current: Settings, seed: int) -> tuple[Settings, float]:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(direction="maximize", sampler=sampler(seed))
        study.enqueue_trial({knob: values.index(current[knob]) for knob, values in KNOBS.items()})
        seen: dict[str, tuple[Settings, list[Measurement]]] = {}
        spent_s = 0.0
        while True:
            trial = study.ask()
            point = {knob: values[trial.suggest_int(knob, 0, len(values) - 1)] for knob, values in KNOBS.items()}
            settings = {**current, **point}
            measured = server.measure(settings, WINDOW_S, seed)
            if spent_s + measured.took_s > BUDGET_S:
                return choose(list(seen.values()), current), spent_s
            spent_s += measured.took_s
            for limit, excess in zip(LIMITS, misses(measured), strict=True):
                trial.set_constraint(limit.name, excess)
            if measured.fault:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            study.tell(trial, math.log(measured.tokens_per_s))
            seen.setdefault(key(settings), (settings, []))[1].append(measured)

    return optimise


def misses(measured: Measurement) -> list[float]:
    """How far each limit is exceeded, as a logarithm; at most 0 where it is kept."""
    return [math.log(measured.observed[limit.name] / limit.ms) if measured.observed else 1.0 for limit in LIMITS]


def choose(seen: list[tuple[Settings, list[Measurement]]], current: Settings) -> Settings:
    passing = [
        (fmean(m.tokens_per_s for m in windows), settings)
        for settings, windows in seen
        if all(fmean(excess) <= 0 for excess in zip(*map(misses, windows), strict=True))
    ]
    return max(passing, key=lambda pair: pair[0], default=(0.0, current))[1]


OPTIMISERS: dict[str, Optimiser] = {
    "ours": ours,
    "tpe": peer(lambda seed: optuna.samplers.TPESampler(seed=seed)),
    "random": peer(lambda seed: optuna.samplers.RandomSampler(seed=seed)),
}
