"""Per-key limits: requests and tokens per minute as token buckets, and concurrent requests.

Each server of a fleet has a part of each limit. When a part is used up, the edge tries the next server.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

from llamaherd_server.config.keys import ANONYMOUS, Key, Share
from llamaherd_server.config.share import Part, part_of
from llamaherd_server.errors import ApiError

log = structlog.get_logger()

WINDOW_S = 60.0
# OpenAI's rate limit headers: https://platform.openai.com/docs/guides/rate-limits
RATE_HEADERS = tuple(
    f"X-RateLimit-{what}-{kind}" for kind in ("Requests", "Tokens") for what in ("Limit", "Remaining", "Reset")
)
# Marks a refusal because this server's part is used up. Gate converts it for nginx, which tries another server.
SHARE_HEADER = "X-Llamaherd-Share"


class Bucket:
    """A token bucket, refilled at `per_minute`, its capacity. Larger amounts need a full bucket and overdraw it."""

    def __init__(self, per_minute: float, now: float) -> None:
        self.per_minute = per_minute
        self.level = per_minute
        self._at = now

    def wait_s(self, needed: float, now: float) -> float:
        """Return the seconds until `needed` tokens, or a full bucket if that is less, are available."""
        self.level = min(self.per_minute, self.level + (now - self._at) * self.per_minute / WINDOW_S)
        self._at = now
        if not self.per_minute:
            return WINDOW_S
        missing = min(needed, self.per_minute) - self.level
        return max(0.0, missing * WINDOW_S / self.per_minute)

    def take(self, amount: float) -> None:
        self.level -= amount


# A key is refused for CRASH_REFUSED_S after CRASHES crashes within CRASH_WINDOW_S at which one of its requests had
# started and had no token yet.
CRASHES = 4
CRASH_WINDOW_S = 600.0
CRASH_REFUSED_S = 300.0


class Quotas:
    """Counts each key's use by its name, so that a reloaded key with the same limit keeps its counts."""

    def __init__(
        self,
        share: Callable[[], Share] = Share,
        instance: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`share` returns this host's current share; `instance` is this server's number on the host."""
        self._share = share
        self._instance = instance
        self._clock = clock
        self._buckets: dict[tuple[str, str], Bucket] = {}
        self._running: defaultdict[str, int] = defaultdict(int)
        self._crashes: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=CRASHES))

    def part(self, key: Key) -> Part:
        """Return this server's part of the key's limits."""
        return part_of(self._share(), self._instance, key)

    @contextmanager
    def request(self, key: Key) -> Iterator[None]:
        """Count a request while it runs; raises a 429 that names the exceeded limit."""
        if wait := self._crash_wait_s(key):
            message = f"the engine crashed on {CRASHES} requests of key {key.name!r}: try again in {math.ceil(wait)} s"
            raise ApiError(429, message, code="engine_crashed", retry_after=math.ceil(wait))
        most = key.max_concurrent
        if most is not None and self._running[key.name] >= self.part(key).requests(most):
            raise _limited(key, f"{key.max_concurrent} concurrent requests", 1.0)
        self._take(key, "requests", key.requests_per_minute, 1)
        self._running[key.name] += 1
        try:
            yield
        finally:
            self._running[key.name] -= 1

    def reserve(self, key: Key, tokens: float) -> None:
        """Take the prompt and completion tokens that a request may use; raises a 429. Pair with `settle`."""
        self._take(key, "tokens", key.tokens_per_minute, tokens)

    def settle(self, key: Key, reserved: float, used: float) -> None:
        """Replace the tokens that `reserve` took by those that were used."""
        if bucket := self._bucket(key, "tokens", key.tokens_per_minute):
            bucket.take(used - reserved)

    def headers(self, key: Key) -> dict[str, str]:
        """Return the RATE_HEADERS of the key's limits. Reset is the time until the bucket is full."""
        told: dict[str, str] = {}
        for names, kind in ((RATE_HEADERS[:3], "requests"), (RATE_HEADERS[3:], "tokens")):
            if bucket := self._bucket(key, kind, getattr(key, f"{kind}_per_minute")):
                full_s = bucket.wait_s(bucket.per_minute, self._clock())
                limit = getattr(key, f"{kind}_per_minute")
                level = (
                    bucket.level * limit / (bucket.per_minute or math.inf)
                )  # assumes that the other servers have as much left
                values = (f"{limit:.12g}", str(max(0, int(level))), duration(full_s))
                told |= dict(zip(names, values, strict=True))
        return told

    def _take(self, key: Key, kind: str, per_minute: float | None, amount: float) -> None:
        if bucket := self._bucket(key, kind, per_minute):
            if wait_s := bucket.wait_s(max(1, amount), self._clock()):
                raise _limited(key, f"{per_minute:g} {kind} per minute", wait_s)
            bucket.take(amount)

    def crashed(self, key: Key) -> None:
        """Record a crash at a request of the key. Anonymous ones do not count: all clients would be refused."""
        if key is ANONYMOUS:
            return
        self._crashes[key.name].append(self._clock())
        log.warning("the engine crashed on a request", key=key.name, refused_for_s=self._crash_wait_s(key))

    def _crash_wait_s(self, key: Key) -> float:
        crashes = self._crashes.get(key.name)
        if crashes is None or len(crashes) < CRASHES or crashes[-1] - crashes[0] > CRASH_WINDOW_S:
            return 0.0
        return max(0.0, crashes[-1] + CRASH_REFUSED_S - self._clock())

    def _bucket(self, key: Key, kind: str, per_minute: float | None) -> Bucket | None:
        if per_minute is None:
            return None
        mine = self.part(key)
        part = mine.requests(per_minute) if kind == "requests" else mine.tokens(per_minute)
        bucket = self._buckets.get((key.name, kind))
        if bucket is None or bucket.per_minute != part:
            bucket = self._buckets[key.name, kind] = Bucket(part, self._clock())
        return bucket


def duration(seconds: float) -> str:
    """Format a duration as OpenAI does: 12ms, 1s, 6m0s, 1h2m3.5s."""
    thousandths = math.ceil(seconds * 1000)
    if thousandths < 1000:
        return f"{thousandths}ms"
    minutes, rest = divmod(thousandths, 60_000)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{rest / 1000:g}s"


def _limited(key: Key, limit: str, wait_s: float) -> ApiError:
    message = f"key {key.name!r} is limited to {limit}: try again in {math.ceil(wait_s)} s"
    headers = {SHARE_HEADER: "used up"}
    return ApiError(429, message, code="rate_limit_exceeded", retry_after=math.ceil(wait_s), headers=headers)
