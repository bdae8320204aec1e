"""Connects a locustfile's user to a load session in each process that sends, and merges what all processes measured.

A master probes the server once and gives each worker its share of the requests (every n-th). When the test stops, the
workers send it their samples. A seed therefore yields the same requests however many workers send them.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

import gevent
import msgspec
from gevent.event import Event
from locust import events
from locust.exception import StopTest
from locust.runners import MasterRunner, WorkerRunner
from locust.user.users import User
from msgspec import Struct

from llamaherd_loadtest.benchmark_report import to_benchmark_report
from llamaherd_loadtest.client import clock
from llamaherd_loadtest.files import write_whole
from llamaherd_loadtest.health import HealthMonitor
from llamaherd_loadtest.locust_options import DEFAULT_WORKLOAD, FILES, add_options
from llamaherd_loadtest.merged_run import MergedRun, Part, merge
from llamaherd_loadtest.probe import ServerUnusable
from llamaherd_loadtest.rng import fresh_seed
from llamaherd_loadtest.samples import write_samples
from llamaherd_loadtest.session import LoadSession, Share
from llamaherd_loadtest.summary import in_words
from llamaherd_loadtest.target_session import Probed, TargetSession

_PLAN, _STOP, _PART, _DONE = "llamaherd_plan", "llamaherd_stop", "llamaherd_part", "llamaherd_done"
_PARTS_TIMEOUT_S = 60.0
_LEAD_S = 2.0  # from the plan to the start of an open loop, so that every worker has it in time

log = logging.getLogger("llamaherd")


class Plan(Struct, frozen=True):
    """What one process is to send; an open loop starts at `start`, in seconds since the epoch."""

    share: Share
    seed: int
    probed: Probed
    start: float


_measured: list[type[User]] = []


def measure(user: type[User], *, open_loop: bool = False) -> None:
    """Measure the tests of `user`. Call this once, at the end of a locustfile; exits if another one already did."""
    _measured.append(user)
    if len(_measured) > 1:
        names = " and ".join(one.__name__ for one in _measured)
        sys.exit(f"locust: {names} cannot be measured together: start Locust once for each")
    run = LocustRun(user, open_loop=open_loop)
    events.init_command_line_parser.add_listener(lambda parser, **_: add_options(parser, open_loop=open_loop))
    events.init.add_listener(run.connect)
    events.test_start.add_listener(run.start)
    events.spawning_complete.add_listener(run.spawned)
    events.test_stopping.add_listener(run.stopping)
    events.test_stop.add_listener(run.stop)
    events.quitting.add_listener(run.quit)


class LocustRun:
    """The tests of one Locust process, one after another; its methods are listeners of Locust's events."""

    def __init__(self, user: type[User], *, open_loop: bool) -> None:
        self._user, self._open_loop = user, open_loop
        self._plan: Plan | None = None
        self._parts, self._all_parts, self._workers, self._done = list[Part](), Event(), 0, 0
        self._session: LoadSession | None = None
        self._full_at = self._stopped_at = 0.0
        self._written = False

    def connect(self, environment: Any, runner: Any, **_: Any) -> None:
        """Register handlers for messages from the other processes."""
        self._environment, self._runner, self._host = environment, runner, environment.host
        options = vars(environment.parsed_options)
        # Paths differ between hosts: a worker's own options win, the master's fill the gaps.
        defaults = ("", DEFAULT_WORKLOAD) if isinstance(runner, WorkerRunner) else ()
        self._files = {name: options.get(name, "") for name in FILES if options.get(name, "") not in defaults}
        # gevent timers (--run-time's too) start at the loop's cached time, from before the imports, seconds ago.
        gevent.get_hub().loop.update_now()
        if isinstance(runner, WorkerRunner):
            runner.register_message(_PLAN, self._receive_plan)
            runner.register_message(_STOP, self._send_part, concurrent=True)
        elif isinstance(runner, MasterRunner):
            runner.register_message(_PART, self._receive_part)
            runner.register_message(_DONE, self._receive_done, concurrent=True)

    def start(self, environment: Any, **_: Any) -> None:
        """Start a test. An unusable server or option ends it with one clear line."""
        try:
            vars(environment.parsed_options).update(self._files)  # a form on Locust's page could have set them
            plan = self._pop_plan() if isinstance(self._runner, WorkerRunner) else None
            self._seed = plan.seed if plan else environment.parsed_options.seed or fresh_seed()
            self._target = TargetSession(environment.parsed_options, self._checked(environment.host or ""), self._seed)
            if isinstance(self._runner, MasterRunner):
                self._send_plans(self._target.probe())
            else:
                self._begin(plan or self._plans(self._target.probe(), 1)[0])
        except (ServerUnusable, ValueError, OSError) as error:
            environment.process_exit_code = 2
            if isinstance(self._runner, MasterRunner):  # Locust ignores StopTest there
                log.error(error)
                gevent.spawn(self._finish)
            raise StopTest(str(error)) from None

    def spawned(self, **_: Any) -> None:
        """Note when all users were started: the load is full once they have warmed up."""
        self._full_at = clock()

    def stopping(self, **_: Any) -> None:
        """Note when the test stops: from then on the load is not full."""
        self._stopped_at = self._stopped_at or clock()

    def stop(self, environment: Any, **_: Any) -> None:
        """Collect what was measured after the test, and write it."""
        if isinstance(self._runner, WorkerRunner):
            return  # the master requests its part
        if isinstance(self._runner, MasterRunner):
            self._runner.send_message(_STOP)
            self._all_parts.wait(_PARTS_TIMEOUT_S + (environment.stop_timeout or 0))
        elif self._session is not None:
            self._parts = [self._end(self._session)]
        if self._parts:
            self._report(merge(self._parts, self._workers - len(self._parts), self._target.limits))

    def quit(self, environment: Any, **_: Any) -> None:
        """Fail a headless run that ended before its load began."""
        if not self._written and environment.parsed_options.headless and not isinstance(self._runner, WorkerRunner):
            if environment.process_exit_code is None:
                log.error("this run is invalid: it ended before the server had answered a first request")
            environment.process_exit_code = environment.process_exit_code or 3

    def _checked(self, host: str) -> str:
        if self._environment.parsed_options.key_file and self._host and host != self._host:
            raise ValueError(
                f"the API key is for {self._host}, not for {host}: start Locust with that --host and its key"
            )
        return host

    def _plans(self, probed: Probed, count: int) -> list[Plan]:
        self._parts, self._all_parts, self._workers, self._done = [], Event(), count, 0
        total, start = self._environment.parsed_options.requests, time.time() + (_LEAD_S if count > 1 else 0.0)
        return [Plan(Share(index, count, total), self._seed, probed, start) for index in range(count)]

    def _send_plans(self, probed: Probed) -> None:
        ready = [worker.id for worker in self._runner.clients.ready]
        for worker, plan in zip(ready, self._plans(probed, len(ready)), strict=True):
            self._runner.send_message(_PLAN, {"plan": msgspec.msgpack.encode(plan)}, worker)

    def _receive_plan(self, msg: Any, **_: Any) -> None:
        self._plan = msgspec.msgpack.decode(msg.data["plan"], type=Plan)

    def _pop_plan(self) -> Plan:
        plan, self._plan = self._plan, None
        if plan is None:
            raise ValueError("this worker joined after the test had started and does not take part in it")
        return plan

    def _begin(self, plan: Plan) -> None:
        source = self._target.source(plan.probed)
        self._session = LoadSession(self._target.client, source, self._environment.events.request.fire, plan.share)
        self._session.on_figure = self._log_figure
        self._session.drain_s = self._environment.stop_timeout or 0.0
        self._user.session = self._session
        self._monitor, self._full_at, self._stopped_at = HealthMonitor(), 0.0, 0.0
        self._watcher = gevent.spawn(self._watch, self._session)
        if self._open_loop:
            warm_up_s = self._environment.parsed_options.warm_up
            start = clock() + plan.start - time.time()
            self._opens_at = start + warm_up_s
            self._dispatcher = gevent.spawn(self._session.dispatch, start, self._target.offsets(), warm_up_s)

    def _log_figure(self, name: str, seconds: float) -> None:
        """Log a figure in a row of its own, which Locust's totals leave out: they count requests only."""
        self._environment.stats.get(name, "SSE").log(seconds * 1000, 0)

    def _watch(self, session: LoadSession) -> None:
        session.done.wait()
        if isinstance(self._runner, WorkerRunner):
            self._runner.send_message(_DONE)
        else:
            gevent.spawn(self._finish)

    def _receive_done(self, **_: Any) -> None:
        self._done += 1
        if self._done == self._workers:
            self._finish()

    def _finish(self) -> None:
        if self._environment.parsed_options.headless:
            self._runner.quit()
        else:
            self._runner.stop()

    def _end(self, session: LoadSession) -> Part:
        self._session = None
        self._watcher.kill()
        if self._open_loop:
            self._dispatcher.kill()
        users, start = sum(self._runner.final_user_classes_count.values()), max(self._full_at, session.warmed_at)
        warmed = session.warmed if self._full_at else 0
        if self._open_loop:
            users, warmed, start = 0, 0, self._opens_at
        elif self._environment.parsed_options.think or session.total:  # not every user has a request in flight
            users, warmed = 0, 0
        elif self._environment.shape_class is not None:  # the load changes on purpose, so all of it counts
            users, warmed, start = 0, 0, min((s.sent for s in session.samples), default=self._stopped_at)
        cpu, lag = self._monitor.stop(start, self._stopped_at)
        return Part(
            samples=session.samples,
            epoch=time.time() - clock(),
            start=start,
            end=self._stopped_at,
            users=users,
            warmed=min(warmed, users),
            cpu=cpu,
            lag_p95_s=lag,
            at_once=self._target.at_once if self._open_loop else 0,
        )

    def _send_part(self, **_: Any) -> None:
        self.stopping()
        self._runner.stop()
        if self._session is not None:
            self._runner.send_message(_PART, {"part": msgspec.msgpack.encode(self._end(self._session))})

    def _receive_part(self, msg: Any, **_: Any) -> None:
        self._parts.append(msgspec.msgpack.decode(msg.data["part"], type=Part))
        if len(self._parts) == self._workers:
            self._all_parts.set()

    def _report(self, run: MergedRun) -> None:
        """Log and write what was measured. The exit status is 0, also with a few errors, 3 for an invalid run, and 2 if
        a file cannot be written."""
        self._written = True
        fault = run.summary.fault
        self._environment.process_exit_code = 3 if fault else 0
        for line in (*in_words(run.summary), f"to send the same requests again: --seed {self._seed}"):
            log.info(line)
        if fault:
            log.error("this run is invalid: %s", fault)
        try:
            self._write(run)
        except OSError as error:
            log.error("cannot write %s: %s", error.filename, error.strerror)
            self._environment.process_exit_code = 2

    def _write(self, run: MergedRun) -> None:
        options = self._environment.parsed_options
        if options.samples:
            write_samples(Path(options.samples), run.samples)
        if options.summary:
            write_whole(Path(options.summary), msgspec.json.format(msgspec.json.encode(run.summary)) + b"\n")
        if options.benchmark_report:
            report = to_benchmark_report(run.summary, options, self._workers, self._seed)
            write_whole(Path(options.benchmark_report), report)
