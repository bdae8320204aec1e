"""Per-key limits: requests and tokens a minute as token buckets, and requests at a time."""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable

import structlog

from llamaherd_server.auth import ANONYMOUS, Key
from llamaherd_server.errors import ApiError

log = structlog.get_logger()

WINDOW_S = 60.0


class Bucket:
    """An allowance that refills evenly to `per_minute`. It may be overdrawn: tokens are known only afterwards."""

    def __init__(self, per_minute: float, now: float) -> None:
        self.per_minute = per_minute
        self.level = per_minute
        self._at = now

    def wait_s(self, needed: float, now: float) -> float:
        """How long until `needed` are there; 0: now. Asks for no more than a full bucket."""
        self.level = min(self.per_minute, self.level + (now - self._at) * self.per_minute / WINDOW_S)
        self._at = now
        missing = min(needed, self.per_minute) - self.level
        return max(0.0, missing * WINDOW_S / self.per_minute)

    def take(self, amount: float) -> None:
        self.level -= amount


# A key whose requests had begun, and had no token yet, in so many crashes within CRASH_WINDOW_S is refused for
# CRASH_REFUSED_S.
CRASHES = 4
CRASH_WINDOW_S = 600.0
CRASH_REFUSED_S = 300.0


class Quotas:
    """What each key has used; kept by name, so that a reloaded key with the same limit keeps its account."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, str], Bucket] = {}
        self._running: defaultdict[str, int] = defaultdict(int)
        self._crashes: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=CRASHES))

    def enter(self, key: Key) -> None:
        """Count a request in, or raise the 429 that says which limit it met. Pair with `leave`."""
        if wait := self._crash_wait_s(key):
            message = f"the engine ended at {CRASHES} requests of key {key.name!r}: try again in {math.ceil(wait)} s"
            raise ApiError(429, message, code="engine_crashed", retry_after=math.ceil(wait))
        if key.max_concurrent is not None and self._running[key.name] >= key.max_concurrent:
            raise _limited(key, f"{key.max_concurrent} requests at a time", 1.0)
        requests = self._bucket(key, "requests", key.requests_per_minute)
        tokens = self._bucket(key, "tokens", key.tokens_per_minute)
        now = self._clock()
        if requests and (wait := requests.wait_s(1, now)):
            raise _limited(key, f"{key.requests_per_minute:g} requests a minute", wait)
        if tokens and (wait := tokens.wait_s(1, now)):
            raise _limited(key, f"{key.tokens_per_minute:g} tokens a minute", wait)
        if requests:
            requests.take(1)
        self._running[key.name] += 1

    def leave(self, key: Key, tokens: int) -> None:
        """Count a request out, with the prompt and completion tokens it used."""
        self._running[key.name] -= 1
        if bucket := self._bucket(key, "tokens", key.tokens_per_minute):
            bucket.take(tokens)

    def crashed(self, key: Key) -> None:
        """Note that the engine ended at a request of the key. Who has no key is nobody: others would be refused too."""
        if key is ANONYMOUS:
            return
        self._crashes[key.name].append(self._clock())
        log.warning("the engine ended at a request", key=key.name, refused_for_s=self._crash_wait_s(key))

    def _crash_wait_s(self, key: Key) -> float:
        crashes = self._crashes.get(key.name)
        if crashes is None or len(crashes) < CRASHES or crashes[-1] - crashes[0] > CRASH_WINDOW_S:
            return 0.0
        return max(0.0, crashes[-1] + CRASH_REFUSED_S - self._clock())

    def _bucket(self, key: Key, kind: str, per_minute: float | None) -> Bucket | None:
        if per_minute is None:
            return None
        bucket = self._buckets.get((key.name, kind))
        if bucket is None or bucket.per_minute != per_minute:
            bucket = self._buckets[key.name, kind] = Bucket(per_minute, self._clock())
        return bucket


def _limited(key: Key, limit: str, wait_s: float) -> ApiError:
    message = f"key {key.name!r} is limited to {limit}: try again in {math.ceil(wait_s)} s"
    return ApiError(429, message, code="rate_limit_exceeded", retry_after=math.ceil(wait_s))
