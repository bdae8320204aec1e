"""One load session: sends a workload's requests for Locust's users and keeps their samples."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import gevent.event
from gevent import GreenletExit

from llamaherd_loadtest.client import PATH, ChatClient, clock
from llamaherd_loadtest.samples import CUT_OFF, OK, Sample
from llamaherd_loadtest.workload import Prompts

_RETRY_PAUSE_S = 0.25
_HOPELESS = 8


class RequestFailed(Exception):
    """What Locust's statistics show for a failed request: its kind and the server's words."""


class LoadSession:
    """Shared by all users of a process. `on_request` is Locust's request event (`environment.events.request.fire`)."""

    def __init__(self, client: ChatClient, prompts: Prompts, on_request: Callable[..., Any]) -> None:
        self.samples: list[Sample] = []
        self.warmed = 0
        self.completed = 0  # counted requests that went well
        self.hopeless = gevent.event.Event()  # set when requests only fail: nothing is left to measure
        self._client, self._prompts, self._on_request = client, prompts, on_request
        self._index = itertools.count()
        self._users = itertools.count()
        self._failures = 0

    def warm_up(self) -> None:
        """A new user's first request, not counted; the user hands its slot over to its first counted one.

        Answers are cut to shares 1/2, 1/4, 3/4, 1/8 …, so that slots do not run in step when counting starts.
        """
        self._send(warmup=True, output_share=_van_der_corput(next(self._users) + 1))
        self.warmed += 1

    def send(self, scheduled: float | None = None) -> Sample:
        """Send the next request now; its latencies count from `scheduled` (open loop) or from the send."""
        return self._send(scheduled=scheduled)

    def _send(self, *, scheduled: float | None = None, warmup: bool = False, output_share: float = 1.0) -> Sample:
        index = next(self._index)
        body = self._prompts.request(index, output_share)
        sample = Sample(index=index, scheduled=clock() if scheduled is None else scheduled, warmup=warmup)
        try:
            self._client.stream(body, sample)
        except GreenletExit:  # the run is over
            sample.outcome, sample.end = CUT_OFF, clock()
            raise
        finally:
            self.samples.append(sample)
        if sample.outcome != OK:
            self._report(sample)
            self._count_failure()
            return sample
        self._failures = 0
        if not warmup:
            self.completed += 1
            self._report(sample)
        return sample

    def _count_failure(self) -> None:
        self._failures += 1
        if self._failures >= _HOPELESS:
            self.hopeless.set()
        gevent.sleep(_RETRY_PAUSE_S)  # a closed loop that fails at once must not hammer the server

    def _report(self, sample: Sample) -> None:
        """Into Locust's statistics, in milliseconds: the request, and TTFT and TPOT as entries of their own."""
        failure = None if sample.outcome == OK else RequestFailed(f"{sample.outcome}: {sample.detail}".rstrip(": "))
        self._fire("POST", PATH, sample.e2e, sample.tokens, failure)
        if failure is None and sample.ttft is not None:
            self._fire("SSE", "TTFT", sample.ttft)
        if failure is None and sample.tpot is not None:
            self._fire("SSE", "TPOT", sample.tpot)

    def _fire(self, kind: str, name: str, seconds: float, length: int = 0, failure: Exception | None = None) -> None:
        self._on_request(
            request_type=kind,
            name=name,
            response_time=seconds * 1000,
            response_length=length,
            exception=failure,
            context={},
        )


def _van_der_corput(n: int) -> float:
    """The n-th of the sequence 1/2, 1/4, 3/4, 1/8, 5/8 …: evenly spread for any number of users."""
    share, scale = 0.0, 0.5
    while n:
        share += scale * (n & 1)
        n, scale = n >> 1, scale / 2
    return share
