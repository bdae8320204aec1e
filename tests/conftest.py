"""What all tests share: two halves that can run side by side, what this machine has to leave out, a real browser."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests import debian

ROOT = Path(__file__).resolve().parents[1]
# Set to `required` where everything has to run, as in CI: what would be left out then ends the run.
POLICY = "LLAMAHERD_TEST_LAB"
LAB_ELSEWHERE = "they run on Debian or Ubuntu as root, in a machine or a VM of its own"
BROWSER = ("chromium", "chromedriver")
LEFT_OUT = pytest.StashKey[dict[str, int]]()  # tests by reason
SCHEDULED = pytest.StashKey[list[LoadScopeScheduling]]()
REPORTED: set[str] = set()  # that hook gets no config


class Halves(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist is untyped
    """Lab hosts have names and addresses of their own: their tests stay in one process, others fill its half up.

    Files of tests/roles go last, each to the process that is done first.
    """

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith("tests/roles/"):
            return nodeid.partition("::")[0]
        return "lab" if nodeid.startswith(("tests/lab/", "tests/monitoring/", "tests/unit/")) else "here"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Halves:
    halves = Halves(config, log)
    config.stash[SCHEDULED] = [halves]
    return halves


# --- what this machine leaves out --------------------------------------------------------------------------------


@cache
def lab_obstacle() -> str:
    """Why no lab host can be booted here; nothing where it can."""
    probe = ["sh", str(ROOT / "roles/lab/files/obstacle.sh"), str(Path.home() / ".cache/llamaherd/lab")]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    return done.stdout.strip() or done.stderr.strip() if done.returncode else ""


@cache
def shortage(programs: tuple[str, ...]) -> str:
    return debian.obtain(programs)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = {}


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Install what a whole run needs before it begins; its two processes find it there."""
    if not session.config.getoption("numprocesses", None):
        return
    obstacles = [f"tests of lab hosts: {lab_obstacle()}"] if lab_obstacle() else []
    if lacking := shortage(debian.OF_EVERY_RUN):
        obstacles.append(f"tests that need them: {lacking}")
    if obstacles and os.environ.get(POLICY) == "required":
        pytest.exit(
            f"{POLICY}=required, but this machine leaves out {'; '.join(obstacles)}", pytest.ExitCode.USAGE_ERROR
        )
    for obstacle in obstacles:
        print(f"left out: {obstacle}", flush=True)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    names = Counter(item.nodeid for item in items)
    if twice := [name for name, count in names.items() if count > 1]:
        raise pytest.UsageError(f"test ids must be unique, or pytest-xdist runs only one of each: {twice[0]}")
    reasons = {item: reason for item in items if (reason := _reason_to_leave_out(item))}
    if reasons:
        config.hook.pytest_deselected(items=list(reasons))
        items[:] = [item for item in items if item not in reasons]
    config.stash[LEFT_OUT] = dict(Counter(reasons.values()))
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out"] = config.stash[LEFT_OUT]


def _reason_to_leave_out(item: pytest.Item) -> str:
    if item.get_closest_marker("lab") and lab_obstacle():
        return f"of lab hosts, as {lab_obstacle()}; {LAB_ELSEWHERE}"
    needed = {program for mark in item.iter_markers("needs") for program in mark.args}
    if "browser" in getattr(item, "fixturenames", ()):
        needed.update(BROWSER)
    lacking = shortage(tuple(sorted(needed)))
    return f"as {lacking}" if lacking else ""


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Both processes collected the same tests."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", {})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    REPORTED.add(report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run that ends well has a report of every test that was collected."""
    for halves in session.config.stash.get(SCHEDULED, []):
        lost = sorted(set(halves.collection or ()) - REPORTED)
        if lost and exitstatus == pytest.ExitCode.OK:
            print(f"\n{len(lost)} collected tests were never reported, {lost[0]} among them")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for reason, count in config.stash[LEFT_OUT].items():
        terminalreporter.write_line(f"left out: {count} {'test' if count == 1 else 'tests'} {reason}", yellow=True)


# --- a real browser ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    browser, driven = (debian.need(program) for program in BROWSER)
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(driven))
    yield driver
    driver.quit()
