"""Turns SIGINT and SIGTERM into one exception in the main greenlet."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import gevent

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """Not an Exception, so that no handler mistakes it for a fault of some settings."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.exit_status = 128 + number


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interrupted on a signal within the block; ignore signals after it, so that cleanup completes."""
    main = gevent.getcurrent()
    watchers = [gevent.signal_handler(n, lambda n=n: gevent.kill(main, Interrupted(n))) for n in _SIGNALS]
    try:
        yield
    finally:
        for number, watcher in zip(_SIGNALS, watchers, strict=True):
            watcher.cancel()
            signal.signal(number, signal.SIG_IGN)
