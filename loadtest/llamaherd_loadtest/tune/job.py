"""One tuning job, from the probe of the server to the written verdict. Importing this applies gevent's patches."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from llamaherd_loadtest.probe import ServerUnusable
from llamaherd_loadtest.quality.asking import Model
from llamaherd_loadtest.quality.suite import of_workload
from llamaherd_loadtest.tune.answers import REFERENCE, Answers, compare_kv_types, kv_types
from llamaherd_loadtest.tune.applier import AdminApplier, Applier, EngineState, Refused
from llamaherd_loadtest.tune.evidence import SLOTS
from llamaherd_loadtest.tune.journal import Journal, ReplayBench
from llamaherd_loadtest.tune.live import LiveBench
from llamaherd_loadtest.tune.options import Options
from llamaherd_loadtest.tune.pace import Calibrated, needed_s
from llamaherd_loadtest.tune.physics import Shape
from llamaherd_loadtest.tune.progress import Progress, say
from llamaherd_loadtest.tune.search import Search, Step, in_flight, min_rounds, pair
from llamaherd_loadtest.tune.settings import Settings, difference, key
from llamaherd_loadtest.tune.signals import interruptible
from llamaherd_loadtest.tune.space import Pruned, candidates, default_space, parse_space, prune
from llamaherd_loadtest.tune.verdict import KvRow, Verdict, make_verdict, read_verdict, write_verdict

_CALIBRATION_SHARE = 0.5  # of the time budget: if one request takes longer, there is no time for more
_ANSWERS_SHARE = 0.1  # of the time budget
_CAPACITY_SHARE = 0.2  # of the time budget
_CAPACITY_FROM_S = 300.0  # below this, the whole budget goes into the choice


class BudgetTooSmall(Exception):
    """The budget is too small for a choice; the message names a sufficient one, and budget.json holds both."""


@contextmanager
def _alone(subject: str) -> Iterator[None]:
    """Hold a lock. Raises ServerUnusable if another tuner of this machine and user is measuring `subject`."""
    name = f"llamaherd-tune-{os.getuid()}-{hashlib.sha256(subject.encode()).hexdigest()[:16]}.lock"
    path = Path(tempfile.gettempdir()) / name
    with path.open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServerUnusable(
                f"another tuner is measuring {subject} (it holds {path}): wait until it ends, or stop it"
            ) from None
        yield


def tune(options: Options) -> Verdict:
    """Search, restore the settings found at the start, write the verdict.

    Raises ServerUnusable, BudgetTooSmall and ValueError if a search is impossible, and Interrupted. However the search
    ends, the settings are restored and what was measured is written.
    """
    with _alone(options.subject):
        return _tune(options)


def _tune(options: Options) -> Verdict:
    applier = AdminApplier(options.admin_url, options.admin_key, options.target.ca)
    found = applier.state()
    if found.state not in ("ready", "unloaded"):  # an unloaded model is loaded for the first request
        raise ServerUnusable(
            f"{options.admin_url} is {found.state}: wait until its /readyz answers 200, or read its log"
        )
    _divide(options, found.settings)  # an invalid search fails here, before the journal is overwritten
    options.out.mkdir(parents=True, exist_ok=True)
    seed = secrets.randbits(24) if options.seed is None else options.seed
    journal = Journal(options.out / "journal.jsonl", _fingerprint(options, found), seed, found.settings)
    always, launch, pruned = _divide(options, journal.current)
    if journal.current != found.settings:
        back = difference(found.settings, journal.current)
        say(f"An earlier search was killed before it could restore the settings: {back}")
        _restore(applier, launch[0])
    bench = LiveBench(options, applier, journal.seed)
    calibrated = _calibrated(options, bench, journal, launch)
    answers = _answers(options, bench, journal, launch)
    permitted = [s == launch[0] or not options.answer_limits or answers.permit(s) for s in launch]
    always, launch = sum(permitted[:always]), [*itertools.compress(launch, permitted)]
    progress, budget_s = Progress(launch), options.budget_s - calibrated.took_s - answers.took_s
    climbs = options.limits and options.load == SLOTS and options.budget_s >= _CAPACITY_FROM_S
    capacity_s = _CAPACITY_SHARE * budget_s if climbs else 0.0

    def on_step(step: Step) -> None:
        journal.record(step)
        progress.show(step)

    search = Search(
        launch,
        options.limits,
        always=always,
        budget_s=budget_s - capacity_s,
        bench=ReplayBench(bench, journal.resumed, journal.trying),
        seed=journal.seed,
        objective=options.objective,
        load=options.load,
        shape=_shape(options),
        calibrated=calibrated,
        larger=_larger(options),
        on_step=on_step,
    )
    say(
        f"{len(launch)} settings to search, {len(pruned)} ruled out; a request takes {calibrated.request_s:.1f} s with "
        f"{calibrated.concurrency} in flight: windows of {search.window_s(launch[0]):.0f} s"
    )
    choice = capacity = None
    try:
        with writable(options.out), interruptible():
            choice = search.run()
            if choice.record.figures and not choice.record.fault:
                capacity = search.capacity(choice.record.settings, capacity_s)
    finally:
        _restore(applier, launch[0])
        verdict = make_verdict(search, choice, pruned)
        verdict.capacity = str(capacity or "")
        verdict.answers = [KvRow.of(one) for one in answers.compared]
        verdict.answer_limits = {limit.name: limit.value for limit in options.answer_limits}
        verdict.limits = {limit.name: limit.ms for limit in options.limits}
        asked = options.workload
        verdict.workload = msgspec.to_builtins(asked) | {"need_tokens": asked.need, "mean_tokens": asked.mean_tokens}
        verdict.provenance = _provenance(options, found, search, journal.seed) | {
            "spent_s": round(calibrated.took_s + answers.took_s + search.spent_s, 1),
            "request_s": round(calibrated.request_s, 2),
            "window_s": round(search.window_s(verdict.chosen), 1),
            "measured": verdict.figures,
        }
        with writable(options.out):
            write_verdict(options.out / "verdict.json", verdict)
    journal.close()
    return verdict


def _calibrated(options: Options, bench: LiveBench, journal: Journal, launch: Sequence[Settings]) -> Calibrated:
    """Return how long a request takes under the load of the search.

    Raises BudgetTooSmall, and ServerUnusable if no request is answered.
    """
    (options.out / "budget.json").unlink(missing_ok=True)
    found = journal.calibrated or bench.calibrated(
        in_flight(launch[0], options.load), journal.seed * 1000, _CALIBRATION_SHARE * options.budget_s
    )
    journal.note(found)
    needed = needed_s(found, pair(launch, options.load), options.budget_s, min_rounds(options.load))
    if len(launch) > 1 and needed > options.budget_s:
        budget = {"needed_s": needed, "budget_s": options.budget_s}
        (options.out / "budget.json").write_bytes(msgspec.json.encode(budget) + b"\n")
        journal.close()  # so that the next run calibrates again: the host may be less busy then
        raise BudgetTooSmall(
            f"a budget of {options.budget_s:g} s is too small to compare settings: one request takes "
            f"{found.request_s:.1f} s with {found.concurrency} in flight; give --budget {needed:.0f}s "
            "(llamaherd_loadgen_budget)"
        )
    return found


def _answers(options: Options, bench: LiveBench, journal: Journal, launch: Sequence[Settings]) -> Answers:
    """Compare answers with the KV types of the settings to launch. Raises ServerUnusable."""
    types = sorted({kv_types(settings) for settings in launch} - {REFERENCE}) if options.answer_limits else []
    if not types:
        return Answers([])
    if journal.answers is None:
        model = Model(options.admin_url, options.target.model, options.admin_key, options.target.ca)
        chats = of_workload(options.workload, bench.calibration)
        found = compare_kv_types(model, chats, types, options.answer_limits, _ANSWERS_SHARE * options.budget_s)
    else:
        found = journal.answers
    journal.note(found)
    for one in found.compared:
        say(f"KV types {', '.join(one.kv_types)}, beside f16: {one.quality}: {one.verdict}")
    return found


def _divide(options: Options, found: Settings) -> tuple[int, list[Settings], list[Pruned]]:
    """Return how many settings are always measured, those to launch (the current first), and those ruled out.

    The engine is among the settings if it is searched or proposed; otherwise the operator's stays.
    """
    quality = bool(options.answer_limits)
    named = parse_space(options.space, found, quality=options.quality or quality)
    space = named or default_space(found, quality=quality)
    proposed = read_verdict(options.proposal).chosen if options.proposal else {}
    current = {k: v for k, v in found.items() if k != "engine" or k in {*space, *proposed}}
    both = {key(settings): settings for settings in (current, {**current, **proposed})}
    tried = list(both.values()) if options.proposal else candidates(current, space, mixed=bool(named))
    launch, pruned = prune(tried, options.workload.need)
    if not launch or launch[0] != current:
        raise ValueError(f"the server's settings cannot serve workload {options.workload.name}: {pruned[0].why}")
    fixed = candidates(current, {})
    return sum(settings in fixed for settings in launch), launch, pruned


def _shape(options: Options) -> Shape:
    """What requests look like to the prior. A turn repeats earlier ones, which the server's cache holds."""
    workload = options.workload
    fresh = workload.turns.added.median if workload.turns else workload.prompt.median - workload.shared_prefix
    return Shape(max(float(fresh), 1.0), float(workload.output.median), options.load.concurrency)


def _larger(options: Options) -> Callable[[Settings], bool]:
    """Return whether given settings with more slots than the space may be tried: not if the operator named it."""
    named = bool(options.space) or options.proposal is not None
    return lambda settings: not named and bool(prune([settings], options.workload.need)[0])


@contextmanager
def writable(out: Path) -> Iterator[None]:
    """Raises ValueError if the block cannot write to `out`."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror}; free space there, or give another --out") from error


def _restore(applier: Applier, settings: Settings) -> None:
    try:
        applier.wait_ready()
        applier.apply(settings)
    except (Refused, ServerUnusable) as error:
        say(f"The settings found at the start could not be restored ({error}). PUT them to /admin/engine by hand:")
        say(json.dumps(dict(settings)))


def _fingerprint(options: Options, found: EngineState) -> str:
    """Return a string that is equal for searches that may resume each other."""
    return json.dumps(
        [
            options.subject,
            msgspec.to_builtins(found.model),
            found.build,
            msgspec.to_builtins(options.workload),
            msgspec.to_builtins([options.limits, options.answer_limits]),
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
        "about": options.about,
        "subject": options.subject,
        "url": options.target.url,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "budget_s": options.budget_s,
        "windows": search.steps,
        "command": options.command,
    }
