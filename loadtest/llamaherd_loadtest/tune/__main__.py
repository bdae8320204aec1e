"""`python -m llamaherd_loadtest.tune`.

Exit status: 0 with a choice, 2 if a search is impossible, 4 if the budget is too small (budget.json in --out then names
a sufficient one), 5 if no window of the current settings was valid. With --in-service, 0 if the settings are better
than the previous ones, and 3 if not.
"""

from __future__ import annotations

# Locust applies gevent's patches to the standard library, which must happen before any other import.
import locust  # noqa: F401 (for its patches)  # isort: skip

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llamaherd_loadtest.probe import ServerUnusable
from llamaherd_loadtest.report.write import write_report
from llamaherd_loadtest.tune.in_service import measure_again
from llamaherd_loadtest.tune.job import BudgetTooSmall, tune, writable
from llamaherd_loadtest.tune.options import parse
from llamaherd_loadtest.tune.progress import say
from llamaherd_loadtest.tune.signals import Interrupted


def main() -> int:
    """Run one job from the command line and return its exit status."""
    try:
        options = parse(sys.argv[1:])
        with _reported(options.out):
            if options.in_service:
                better, sentence = measure_again(options)
                say(sentence)
                return 0 if better else 3
            verdict = tune(options)
    except (BudgetTooSmall, ServerUnusable, ValueError, OSError) as error:
        sys.stderr.write(f"tune: {error}\n")
        return 4 if isinstance(error, BudgetTooSmall) else 2
    except Interrupted as reason:
        sys.stderr.write(f"tune: {reason}; the settings found at the start were restored\n")
        return reason.exit_status
    except KeyboardInterrupt:
        sys.stderr.write("tune: interrupted; nothing was changed\n")
        return 130
    say(verdict.sentence)
    say(f"Report: {options.out / 'report.html'}")
    if not verdict.measured:
        sys.stderr.write(f"tune: no window of the current settings was valid: {verdict.sentence}\n")
    return 0 if verdict.measured else 5


@contextmanager
def _reported(out: Path) -> Iterator[None]:
    """Write the report if the block wrote a verdict, however it ended."""
    before = _written(out / "verdict.json")
    try:
        yield
    finally:
        if _written(out / "verdict.json") != before:
            with writable(out):
                write_report(out, out / "report.html")


def _written(path: Path) -> tuple[int, int]:
    found = path.stat() if path.exists() else None
    return (found.st_ino, found.st_mtime_ns) if found else (0, 0)


if __name__ == "__main__":
    sys.exit(main())
