"""Decisions of the tuner on simulated hosts whose true performance is known, by its time budget.

Two families. `plain`: three knobs, 80 settings, a surface of another form than the prior's. `hosts`: seven knobs, 2268
settings, finite windows, slow models, drift, invalid windows, settings that do not fit. Reports for each budget the
share of servers on which the choice is within 5 % of the best and within the limits. Peers are Optuna's TPE and random
search, with 15 minutes on `plain`: they measure the current settings first, and choose the best mean among settings
that on average kept the limits. BENCH_SEEDS servers (200) from BENCH_FIRST (0) on; 0 to 199 were used in development.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from statistics import fmean

import optuna
from msgspec import Struct

from bench.table import Metric, Result, metric
from llamaherd_loadtest.tune.evidence import Measurement
from llamaherd_loadtest.tune.settings import Settings, key
from tests.loadtest import simulated_hosts
from tests.loadtest.simulated import CURRENT, KNOBS, LIMITS, SimulatedServer, search

SEEDS = range(first := int(os.environ.get("BENCH_FIRST", "0")), first + int(os.environ.get("BENCH_SEEDS", "200")))
BUDGETS_S = {"150_s": 150.0, "6_min": 360.0, "15_min": 900.0, "30_min": 1800.0}
WINDOW_S = 18.0  # of the peers; as long as the tuner's own with 15 minutes
DRIFT = math.log(0.8)
INVALID = 0.05


class Outcome(Struct, frozen=True):
    """Result of one search on one server. `empty`: no choice, although the budget was enough for one."""

    within_5_percent: bool
    breaks_limits: bool = False
    changed: bool = False
    empty: bool = False


Optimiser = Callable[[SimulatedServer, Settings, float, int], Settings]


def run() -> Result:
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of the processes that are started from here
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:

        def outcomes(one: Callable[[int], Outcome | None]) -> list[Outcome]:
            return [found for found in pool.map(one, SEEDS, chunksize=2) if found]

        result: Result = {}
        for name, budget_s in BUDGETS_S.items():
            result[f"plain_{name}"] = figures(outcomes(partial(plain, "ours", budget_s)))
            result[f"hosts_{name}"] = figures(outcomes(partial(host, budget_s)))
        quarter_s = BUDGETS_S["15_min"]
        result["hosts_15_min_drift"] = figures(outcomes(partial(host, quarter_s, drift=DRIFT)))
        result["hosts_15_min_invalid"] = figures(outcomes(partial(host, quarter_s, spoiled=INVALID)))
        for peer in ("tpe", "random"):
            for name, value in figures(outcomes(partial(plain, peer, quarter_s))).items():
                result["plain_15_min"][name] |= {peer: value["ours"]}
        for name, drift in {"": 0.0, "_drift": DRIFT}.items():
            found = outcomes(partial(best_already, quarter_s, drift=drift))
            result[f"hosts_15_min_best{name}"] = {"changed": metric({"ours": [fmean(o.changed for o in found)]})}
        flat = outcomes(partial(plain, "ours", quarter_s, flat=True))
        result["plain_15_min_flat"] = {"changed": metric({"ours": [fmean(o.changed for o in flat)]})}
        return result


def figures(outcomes: Sequence[Outcome]) -> dict[str, Metric]:
    names = ("within_5_percent", "breaks_limits", "empty")
    return {name: metric({"ours": [fmean(getattr(o, name) for o in outcomes)]}) for name in names}


def plain(optimiser: str, budget_s: float, seed: int, *, flat: bool = False) -> Outcome:
    server = SimulatedServer(seed, flat=flat)
    choice = OPTIMISERS[optimiser](server, CURRENT, budget_s, seed)
    share = server.truth(choice)[0] / server.truth(server.best())[0]
    passes = server.passes(choice)
    return Outcome(share >= 0.95 and passes, choice != CURRENT and not passes, choice != CURRENT)


def host(budget_s: float, seed: int, *, drift: float = 0.0, spoiled: float = 0.0) -> Outcome | None:
    """Tune one host; None if no setting keeps its limits. A budget that is rejected as too small counts as a miss."""
    server = simulated_hosts.Host(seed, drift=drift, budget_s=budget_s, spoiled=spoiled)
    best, current = server.best(), simulated_hosts.CURRENT
    if best is None:
        return None
    tried, choice = simulated_hosts.tune(server, current, budget_s=budget_s, seed=seed)
    passes = server.passes(choice)
    return Outcome(
        within_5_percent=passes and server.truth(choice)[0] >= 0.95 * server.truth(best)[0],
        breaks_limits=choice != current and not passes,
        changed=choice != current,
        empty=tried is not None and not tried.records[0].figures,
    )


def best_already(budget_s: float, seed: int, *, drift: float = 0.0) -> Outcome | None:
    """Tune a host whose current settings are the best, so that a change is useless, unless others are as good."""
    server = simulated_hosts.Host(seed, drift=drift, budget_s=budget_s)
    if (best := server.best()) is None:
        return None
    _, choice = simulated_hosts.tune(server, best, budget_s=budget_s, seed=seed)
    return Outcome(True, changed=choice != best)


def ours(server: SimulatedServer, current: Settings, budget_s: float, seed: int) -> Settings:
    return search(server, current, budget_s=budget_s, seed=seed).run().record.settings


def peer(sampler: Callable[[int], optuna.samplers.BaseSampler]) -> Optimiser:
    def optimise(server: SimulatedServer, current: Settings, budget_s: float, seed: int) -> Settings:
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
            if spent_s + measured.took_s > budget_s:
                return choose(list(seen.values()), current)
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
    """Return by how much each limit is exceeded, as a logarithm; at most 0 if it is kept."""
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
