"""Computes how many hosts serve N users within the limits: a discrete-event simulation from one host's profile.

    python -m llamaherd_loadtest.capacity --profile profile.json --users 200 --think 20 --limit ttft_p95=2s

With --hosts instead of --users it prints how many users they serve. llamaherd_loadtest.profile makes the profile.

A host has `parallel` slots and a first-come, first-served queue. Requests share the host as they did when it was
measured: with n busy slots each generates a token every TPOT(n) seconds, and prompts are computed one at a time. The
edge picks the host with the fewest requests (least_conn). Users send, read, think for an exponentially distributed time
and repeat: the machine-repairman model (Kleinrock, Queueing Systems I, 3.8) with load-dependent service times.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
import sys
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path

import msgspec
from msgspec import Struct

from llamaherd_loadtest.limits import Limit, observe, parse_limit
from llamaherd_loadtest.rng import seeded
from llamaherd_loadtest.samples import Sample
from llamaherd_loadtest.workload import Workload, load_workload

Work = Callable[[random.Random], tuple[float, float]]  # prompt and output tokens of the next request
_INSTANT_S = 1e-7  # work with less than this left counts as done; a float clock resolves it however long the run


class Profile(Struct, frozen=True, forbid_unknown_fields=True):
    """A host measured on one workload. `tpot_s` maps the number of busy slots to seconds per output token."""

    parallel: int
    prompt_tokens_per_s: float
    tpot_s: dict[int, float]

    def __post_init__(self) -> None:
        if not self.tpot_s or self.parallel < 1 or min(self.prompt_tokens_per_s, *self.tpot_s.values()) <= 0:
            raise ValueError("a profile needs parallel >= 1 and positive prompt_tokens_per_s and tpot_s")

    def tpot(self, busy: int) -> float:
        """Seconds per token with `busy` slots, interpolated linearly; outside the measured range, the nearest point."""
        points = sorted(self.tpot_s.items())
        for (low, at_low), (high, at_high) in itertools.pairwise(points):
            if low <= busy <= high:
                return at_low + (at_high - at_low) * (busy - low) / (high - low)
        return points[0][1] if busy < points[0][0] else points[-1][1]


class _Host:
    """The state of one host between two events; `at` is the simulated time up to which it has advanced."""

    def __init__(self, profile: Profile) -> None:
        self.profile, self.at = profile, 0.0
        self.queue: deque[_Request] = deque()
        self.prompts: deque[_Request] = deque()  # requests that have a slot; the first one's prompt is being computed
        self.decoding: list[_Request] = []

    @property
    def requests(self) -> int:
        return len(self.queue) + self.busy

    @property
    def busy(self) -> int:
        return len(self.prompts) + len(self.decoding)

    def next_event(self) -> float:
        """Return the time at which the next prompt or answer completes, if no request arrives earlier."""
        waits = [request.left * self.profile.tpot(self.busy) for request in self.decoding]
        if self.prompts:
            waits.append(self.prompts[0].prompt / self.profile.prompt_tokens_per_s)
        return self.at + max(0.0, min(waits)) if waits else math.inf

    def work(self, until: float) -> list[_Request]:
        """Advance to `until`, at most the next event, and return the requests that completed."""
        spent, self.at = until - self.at, until
        tpot = self.profile.tpot(self.busy)
        for request in self.decoding:
            request.left -= spent / tpot
        ended = [request for request in self.decoding if request.left * tpot <= _INSTANT_S]
        if self.prompts:
            self.prompts[0].prompt -= spent * self.profile.prompt_tokens_per_s
            if self.prompts[0].prompt <= _INSTANT_S * self.profile.prompt_tokens_per_s:
                self.prompts[0].sample.first = until
                self.decoding.append(self.prompts.popleft())
        for request in ended:
            self.decoding.remove(request)
            request.sample.last = request.sample.end = until
        self.admit()
        return ended

    def admit(self) -> None:
        while self.queue and self.busy < self.profile.parallel:
            self.prompts.append(self.queue.popleft())


class _Request(Struct, eq=False):
    user: int
    sample: Sample
    prompt: float  # tokens left to compute
    left: float  # tokens left to generate, without the first


def simulate(profile: Profile, hosts: int, users: int, think_s: float, work: Work, *, requests: int) -> list[Sample]:
    """Return the first `requests` answers to `users` who think `think_s` seconds on average, by completion time.

    Every user starts with a think pause. The first fifth of the answers is marked as warm-up.
    """
    rng, fleet, ended = seeded("capacity", hosts, users), [_Host(profile) for _ in range(hosts)], list[Sample]()
    wakes = [(rng.expovariate(1 / think_s), user) for user in range(users)]
    heapq.heapify(wakes)
    while len(ended) < requests:
        due, host = min(((host.next_event(), host) for host in fleet), key=itemgetter(0))
        if wakes and wakes[0][0] <= due:
            now, user = heapq.heappop(wakes)
            prompt, output = work(rng)
            host = min(fleet, key=lambda host: host.requests)
            host.work(now)
            sample = Sample(index=len(ended), scheduled=now, sent=now, completion_tokens=round(output))
            host.queue.append(_Request(user, sample, prompt, max(0.0, output - 1)))
            host.admit()
            continue
        for request in host.work(due):
            request.sample.warmup = len(ended) < requests / 5
            ended.append(request.sample)
            heapq.heappush(wakes, (due + rng.expovariate(1 / think_s), request.user))
    return ended


def hosts_needed(profile: Profile, users: int, think_s: float, work: Work, limits: list[Limit]) -> int:
    """Return the fewest hosts that keep all limits. Raises ValueError if one host per user is not enough."""

    def enough(hosts: int) -> bool:
        return within(limits, simulate(profile, hosts, users, think_s, work, requests=_requests(users)))

    most = 1
    while not enough(most):
        if most >= users:
            raise ValueError("even one host per user misses the limits: more hosts do not speed up a request")
        most *= 2
    return bisect_left(range(1, most), True, lo=most // 2, key=enough) + 1


def users_served(profile: Profile, hosts: int, think_s: float, work: Work, limits: list[Limit]) -> int:
    """Return the most users for whom all limits hold. Raises ValueError if a single user misses them."""

    def too_many(users: int) -> bool:
        return not within(limits, simulate(profile, hosts, users, think_s, work, requests=_requests(users)))

    most = 1
    while not too_many(most):
        most *= 2
    if most == 1:
        raise ValueError("even a single user misses the limits: more hosts do not speed up a request")
    return bisect_left(range(most), True, lo=most // 2, key=too_many) - 1


def within(limits: list[Limit], samples: list[Sample]) -> bool:
    """Return whether these requests keep all limits, not counting those marked as warm-up."""
    seen = [(limit, observe(limit, [s for s in samples if not s.warmup])) for limit in limits]
    return all(value is not None and value <= limit.ms for limit, value in seen)


def _requests(users: int) -> int:
    return max(2000, 20 * users)


def of_workload(workload: Workload) -> Work:
    """Return a function that draws prompt and output lengths from the distributions of `workload`."""
    return lambda rng: (
        workload.prompt.at(rng.uniform(0.001, 0.999)),
        workload.output.at(rng.uniform(0.001, 0.999)),
    )


def main() -> None:
    """Print the number of hosts or users; on invalid input, exit with one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m llamaherd_loadtest.capacity", description=__doc__)
    add = parser.add_argument
    add("--profile", type=Path, required=True, help="JSON: parallel, prompt_tokens_per_s, tpot_s {busy slots: seconds}")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--users", type=int, help="print the hosts needed for this many users")
    mode.add_argument("--hosts", type=int, help="print the users served by this many hosts")
    add("--think", type=float, required=True, help="average seconds from the end of an answer to the next request")
    add("--workload", default="chat", help="workload name or .yml file")
    add("--limit", action="append", required=True, help="such as ttft_p95=2s; may be repeated")
    args = parser.parse_args()
    try:
        profile = msgspec.json.decode(args.profile.read_bytes(), type=Profile)
        limits, work = [parse_limit(text) for text in args.limit], of_workload(load_workload(args.workload))
        if args.users:
            answer = hosts_needed(profile, args.users, args.think, work, limits)
        else:
            answer = users_served(profile, args.hosts, args.think, work, limits)
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        sys.exit(f"llamaherd_loadtest.capacity: {error}")
    sys.stdout.write(f"{answer}\n")


if __name__ == "__main__":
    main()
