"""Admission: a bounded queue before the engine, fair among keys.

Start-time fair queueing (Goyal, Vin, Cheng 1996): each key's next request has a virtual start time, the smallest goes
first, and a request moves its key's clock on by cost / priority. A key that floods only fills its own clock. Ageing: a
key that has waited long since it was last served is moved forward, so that a small priority never starves.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from llamaherd_server.auth import Key
from llamaherd_server.errors import ApiError

# A minute of waiting puts a key 600 tokens, about one chat turn, before the others.
AGEING_TOKENS_PER_S = 10.0
# Weight of the newest request in the running mean of service times that Retry-After is computed from.
_SMOOTHING = 0.1


@dataclass(eq=False, slots=True)
class Ticket:
    """A place in the queue and then in the engine. `cost` is the expected prompt and completion length in tokens."""

    key: Key
    cost: float
    admitted: asyncio.Future[None]
    started_at: float = math.nan


@dataclass(slots=True)
class _Flow:
    """One key's requests. `finish` is the virtual time at which its last dispatched request would have been done."""

    waiting: deque[Ticket] = field(default_factory=deque)
    finish: float = 0.0
    since: float = 0.0


class Admission:
    """Hands requests to the engine: as many as it has slots, and a few more so that a freed slot never idles."""

    def __init__(
        self, *, max_queue: int, timeout_s: float, parallel: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_queue = max_queue
        self._timeout_s = timeout_s
        self._clock = clock
        self._flows: dict[str, _Flow] = {}
        self._virtual = 0.0
        self._service_s = 1.0
        self.queued = 0
        self.running = 0
        self.set_parallel(parallel)

    def set_parallel(self, parallel: int) -> None:
        """Follow the engine's number of slots."""
        self._parallel = parallel
        self.limit = parallel + max(1, parallel // 4)
        self._dispatch()

    def enter(self, key: Key, costs: list[float]) -> list[Ticket]:
        """Queue one request a cost, all or none; raises the 429 when they do not fit. Pair each with `leave`.

        In a full queue the key with the most waiting makes room: its newest request gets the 429.
        """
        if len(costs) > self._max_queue:
            message = f"{len(costs)} generations in one request are more than the {self._max_queue} that may be queued"
            raise ApiError(400, message, param="n", code="invalid_value")
        now = self._clock()
        flow = self._flows.setdefault(key.name, _Flow())
        while self.queued + len(costs) > self._max_queue:
            longest = max(self._flows.values(), key=lambda flow: len(flow.waiting))
            if len(longest.waiting) <= len(flow.waiting) + len(costs):
                raise self._full()
            self._push_out(longest)
        if not flow.waiting:
            flow.since = now
            flow.finish = max(flow.finish, self._virtual)
        loop = asyncio.get_running_loop()
        tickets = [Ticket(key, cost, loop.create_future()) for cost in costs]
        flow.waiting.extend(tickets)
        self.queued += len(tickets)
        self._dispatch()
        return tickets

    async def admitted(self, ticket: Ticket) -> None:
        """Wait for the ticket's turn; raises the 503 at the deadline. Leaving is still the caller's part."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await ticket.admitted
        except TimeoutError:
            message = f"no slot became free within {self._timeout_s:g} s: the server is overloaded"
            raise ApiError(503, message, code="queue_timeout", retry_after=self._retry_after_s()) from None

    def leave(self, ticket: Ticket, tokens: int) -> None:
        """Give the place back, queued or running. The `tokens` it used correct what its key was charged."""
        flow = self._flows[ticket.key.name]
        if math.isnan(ticket.started_at):
            if ticket in flow.waiting:
                flow.waiting.remove(ticket)
                self.queued -= 1
            return
        self.running -= 1
        flow.finish += (tokens - ticket.cost) / ticket.key.priority
        self._service_s += _SMOOTHING * (self._clock() - ticket.started_at - self._service_s)
        self._dispatch()

    def _dispatch(self) -> None:
        while self.running < self.limit and self.queued:
            now = self._clock()
            flow = min(
                (flow for flow in self._flows.values() if flow.waiting),
                key=lambda flow: flow.finish - (now - flow.since) * AGEING_TOKENS_PER_S,
            )
            ticket = flow.waiting.popleft()
            self._virtual = max(self._virtual, flow.finish)
            flow.finish = max(flow.finish, self._virtual) + ticket.cost / ticket.key.priority
            flow.since = ticket.started_at = now
            self.queued -= 1
            self.running += 1
            if not ticket.admitted.done():  # a caller that has gone will leave in a moment
                ticket.admitted.set_result(None)

    def _push_out(self, flow: _Flow) -> None:
        ticket = flow.waiting.pop()
        self.queued -= 1
        if not ticket.admitted.done():
            ticket.admitted.set_exception(self._full())

    def _retry_after_s(self) -> int:
        return max(1, min(60, math.ceil(self.queued * self._service_s / self._parallel)))

    def _full(self) -> ApiError:
        message = f"the queue is full: {self.queued} of at most {self._max_queue} requests are waiting"
        return ApiError(429, message, code="queue_full", retry_after=self._retry_after_s())
