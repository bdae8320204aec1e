"""A load session: sends a workload's requests for Locust's users and keeps their samples."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import gevent.event
import gevent.pool
from gevent import GreenletExit
from msgspec import Struct

from llamaherd_loadtest.client import PATH, ChatClient, clock
from llamaherd_loadtest.samples import CUT_OFF, OK, Sample
from llamaherd_loadtest.workload import Conversation

_RETRY_PAUSE_S = 0.25
_MAX_FAILURES_IN_A_ROW = 8


class Source(Protocol):
    """The source of requests: `Prompts`, also of a trace, or a `Replay`."""

    @property
    def needs_answers(self) -> bool:
        """Whether later requests of a conversation contain the answers to earlier ones."""

    def conversation(self, index: int, output_share: float = 1.0) -> Conversation:
        """Yield the requests of conversation `index`."""


class Share(Struct, frozen=True):
    """The conversations that this process sends: every `count`-th from `index` on, up to `total` (0: without end)."""

    index: int = 0
    count: int = 1
    total: int = 0

    def indices(self) -> Iterator[int]:
        """Their numbers, in the order of sending."""
        return iter(self._numbers) if self.total else itertools.count(self.index, self.count)

    @property
    def size(self) -> int:
        """Number of conversations; 0: without end."""
        return len(self._numbers)

    @property
    def _numbers(self) -> range:
        return range(self.index, self.total, self.count)


class RequestFailed(Exception):
    """What Locust's statistics show for a failed request: the kind of failure and the server's message."""


class LoadSession:
    """Shared by all users of a process. `on_request` is Locust's request event (`environment.events.request.fire`).

    `on_figure` receives each TTFT and TPOT by name, in seconds: they are not requests.
    """

    def __init__(
        self, client: ChatClient, source: Source, on_request: Callable[..., Any], share: Share | None = None
    ) -> None:
        share = share or Share()
        self.total = share.total  # conversations; 0: without end
        self.samples: list[Sample] = []
        self.warmed = 0
        self.warmed_at = 0.0  # when the last user had warmed up, on the client's clock
        self.drain_s = 0.0
        self.completed = 0  # successful requests, without warm-ups
        self.only_failures = gevent.event.Event()  # set when requests only fail and measuring is pointless
        self.done = gevent.event.Event()  # set when the whole share is sent and answered
        self.on_figure: Callable[[str, float], None] = lambda *_: None
        self._client, self._source, self._on_request, self._share = client, source, on_request, share
        self._indices = share.indices()
        self._warm_ups = itertools.count(share.index, share.count)
        self._ended = 0
        self._failures = 0

    def warm_up(self) -> None:
        """Send a new user's first request, which is not counted; the user's next one takes over its slot.

        Answers are cut to shares 1/2, 1/4, 3/4, 1/8 …, so that slots are out of step when counting starts.
        """
        user = next(self._warm_ups)
        body = next(self._source.conversation(-1 - user, _van_der_corput(user + 1)))
        self._send(body, Sample(index=-1 - user, scheduled=clock(), warmup=True))
        self.warmed, self.warmed_at = self.warmed + 1, clock()

    def send(self) -> None:
        """Hold the next conversation, each request right after the previous answer; wait if none is left."""
        index = next(self._indices, None)
        if index is None:
            gevent.sleep(1.0)
        else:
            conversation = self._source.conversation(index)
            self._run(index, conversation, next(conversation))

    def dispatch(self, start: float, offsets: Iterator[float], warm_up_s: float = 0.0) -> None:
        """Send this process's share of conversations, each at `start` + its offset on the client's clock.

        Latencies count from that time. Requests of the first `warm_up_s` seconds are warm-ups. Returns when all are
        answered. If killed, it gives requests in flight `drain_s` seconds and cuts off the rest.
        """
        in_flight = gevent.pool.Group()
        mine = itertools.islice(enumerate(offsets), self._share.index, self._share.total or None, self._share.count)
        try:
            for index, offset in mine:
                conversation, scheduled = self._source.conversation(index), start + offset
                body = next(conversation)  # built before it is due
                gevent.sleep(max(0.0, scheduled - clock()))
                in_flight.start(gevent.Greenlet(self._run, index, conversation, body, scheduled, offset < warm_up_s))
            in_flight.join()
            self.done.set()
        finally:
            in_flight.join(self.drain_s)
            in_flight.kill()

    def _run(
        self,
        index: int,
        conversation: Conversation,
        body: bytes,
        scheduled: float | None = None,
        warmup: bool = False,
    ) -> None:
        try:
            for turn in itertools.count():
                text: list[str] | None = [] if self._source.needs_answers else None
                at = clock() if scheduled is None else scheduled
                if not self._send(body, Sample(index=index, turn=turn, scheduled=at, warmup=warmup), text):
                    return
                body = conversation.send("".join(text or []))
                scheduled = None
        except StopIteration:
            pass
        finally:
            self._ended += 1
            if self._ended == self._share.size:
                self.done.set()

    def _send(self, body: bytes, sample: Sample, text: list[str] | None = None) -> bool:
        try:
            self._client.stream(body, sample, text)
        except GreenletExit:  # the run is over
            sample.outcome, sample.end = CUT_OFF, clock()
            raise
        finally:
            self.samples.append(sample)
        if sample.outcome != OK:
            self._report(sample)
            self._count_failure()
            return False
        self._failures = 0
        if not sample.warmup:
            self.completed += 1
            self._report(sample)
        return True

    def _count_failure(self) -> None:
        self._failures += 1
        if self._failures >= _MAX_FAILURES_IN_A_ROW:
            self.only_failures.set()
        gevent.sleep(_RETRY_PAUSE_S)  # a closed loop that fails at once must not flood the server

    def _report(self, sample: Sample) -> None:
        """Report a request in milliseconds, and its TTFT and TPOT, to Locust's statistics."""
        failure = None if sample.outcome == OK else RequestFailed(f"{sample.outcome}: {sample.detail}".rstrip(": "))
        self._on_request(
            request_type="POST",
            name=PATH,
            response_time=sample.e2e * 1000,
            response_length=sample.tokens,
            exception=failure,
            context={},
        )
        if failure is None and sample.ttft is not None:
            self.on_figure("TTFT", sample.ttft)
        if failure is None and sample.tpot is not None:
            self.on_figure("TPOT", sample.tpot)


def _van_der_corput(n: int) -> float:
    """The n-th of the sequence 1/2, 1/4, 3/4, 1/8, 5/8 …: evenly spread for any number of users."""
    share, scale = 0.0, 0.5
    while n:
        share += scale * (n & 1)
        n, scale = n >> 1, scale / 2
    return share
