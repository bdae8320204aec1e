"""One tuning job, from the first look at the server to the written verdict. Importing this patches for gevent."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from llamaherd_loadtest.probe import ServerUnusable
from llamaherd_loadtest.report.write import write_report
from llamaherd_loadtest.tune.applier import AdminApplier, Applier, EngineState, Refused
from llamaherd_loadtest.tune.evidence import SLOTS
from llamaherd_loadtest.tune.journal import Journal, ReplayBench
from llamaherd_loadtest.tune.live import LiveBench
from llamaherd_loadtest.tune.options import Options
from llamaherd_loadtest.tune.progress import Progress, say
from llamaherd_loadtest.tune.search import Search, Step
from llamaherd_loadtest.tune.settings import Settings, difference, key
from llamaherd_loadtest.tune.signals import interruptible
from llamaherd_loadtest.tune.space import DEFAULT_SPACE, Pruned, candidates, parse_space, prune
from llamaherd_loadtest.tune.verdict import Verdict, make_verdict, read_verdict, write_verdict

_CAPACITY_SHARE = 0.2  # of the time budget
_CAPACITY_FROM_S = 300.0  # below, all of it goes into the choice


def tune(options: Options) -> Verdict:
    """Search, put back the settings found at the start, write verdict and report.

    Raises ServerUnusable and ValueError for what makes a search impossible, and Interrupted; whatever ends the search
    early, the settings are put back and what was measured is written.
    """
    applier = AdminApplier(options.admin_url, options.admin_key, options.target.ca)
    found = applier.state()
    if found.state != "ready":
        raise ServerUnusable(
            f"{options.admin_url} is {found.state}: wait until its /readyz answers 200, or read its log"
        )
    _divide(options, found.settings)  # what cannot be searched leaves the journal alone
    options.out.mkdir(parents=True, exist_ok=True)
    seed = secrets.randbits(24) if options.seed is None else options.seed
    journal = Journal(options.out / "journal.jsonl", _fingerprint(options, found), seed, found.settings)
    always, launch, pruned = _divide(options, journal.current)
    if journal.current != found.settings:
        back = difference(found.settings, journal.current)
        say(f"An earlier search was killed with its own settings in force: {back}")
        _restore(applier, launch[0])
    bench = LiveBench(options, applier, journal.seed)
    progress = Progress(launch)
    climbs = options.limits and options.load == SLOTS and options.budget_s >= _CAPACITY_FROM_S
    capacity_s = _CAPACITY_SHARE * options.budget_s if climbs else 0.0

    def on_step(step: Step) -> None:
        journal.record(step)
        progress.show(step)

    search = Search(
        launch,
        options.limits,
        always=always,
        budget_s=options.budget_s - capacity_s,
        bench=ReplayBench(bench, journal.resumed, journal.trying),
        seed=journal.seed,
        objective=options.objective,
        load=options.load,
        on_step=on_step,
    )
    say(f"{len(launch)} settings to search, {len(pruned)} ruled out; windows of {search.window_s:.0f} s")
    choice = capacity = None
    try:
        with _room(options.out), interruptible():
            choice = search.run()
            capacity = None if choice.record.fault else search.capacity(choice.record.settings, capacity_s)
    finally:
        _restore(applier, launch[0])
        verdict = make_verdict(search, choice, pruned)
        verdict.capacity = str(capacity or "")
        verdict.limits = {limit.name: limit.ms for limit in options.limits}
        verdict.workload = msgspec.to_builtins(options.workload) | {"need_tokens": options.workload.need}
        verdict.provenance = _provenance(options, found, search, journal.seed) | {"measured": verdict.figures}
        _write(options, verdict)
    journal.close()
    return verdict


def _divide(options: Options, found: Settings) -> tuple[int, list[Settings], list[Pruned]]:
    """How many settings are always measured; those to launch, the current first; those ruled out.

    The engine is among them where it is searched or proposed; otherwise it stays what the operator says.
    """
    space = parse_space(options.space, found, quality=options.quality) or {
        k: v for k, v in DEFAULT_SPACE.items() if k in found
    }
    proposed = read_verdict(options.proposal).chosen if options.proposal else {}
    current = {k: v for k, v in found.items() if k != "engine" or k in {*space, *proposed}}
    both = {key(settings): settings for settings in (current, {**current, **proposed})}
    tried = list(both.values()) if options.proposal else candidates(current, space)
    launch, pruned = prune(tried, options.workload.need)
    if not launch or launch[0] != current:
        raise ValueError(f"the server's settings cannot serve workload {options.workload.name}: {pruned[0].why}")
    fixed = candidates(current, {})
    return sum(settings in fixed for settings in launch), launch, pruned


@contextmanager
def _room(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror}; make room there, or give another --out") from error


def _restore(applier: Applier, settings: Settings) -> None:
    try:
        applier.wait_ready()
        applier.apply(settings)
    except (Refused, ServerUnusable) as error:
        say(f"The settings found at the start could not be put back ({error}). Send them to /admin/engine by hand:")
        say(json.dumps(dict(settings)))


def _fingerprint(options: Options, found: EngineState) -> str:
    """Equal for searches that may resume each other."""
    return json.dumps(
        [
            options.subject,
            msgspec.to_builtins(found.model),
            found.build,
            msgspec.to_builtins(options.workload),
            msgspec.to_builtins(options.limits),
            options.objective.name,
            msgspec.to_builtins(options.load),
            options.budget_s,
            options.seed,
            options.space,
            options.quality,
            read_verdict(options.proposal).chosen if options.proposal else {},
        ],
        sort_keys=True,
    )


def _provenance(options: Options, found: EngineState, search: Search, seed: int) -> dict[str, object]:
    return {
        "model": msgspec.to_builtins(found.model),
        "engine": found.engine,
        "build": found.build,
        "subject": options.subject,
        "url": options.target.url,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "budget_s": options.budget_s,
        "spent_s": round(search.spent_s, 1),
        "windows": search.steps,
        "window_s": round(search.window_s, 1),
        "command": options.command,
    }


def _write(options: Options, verdict: Verdict) -> None:
    with _room(options.out):
        write_verdict(options.out / "verdict.json", verdict)
        write_report(options.out, options.out / "report.html")
