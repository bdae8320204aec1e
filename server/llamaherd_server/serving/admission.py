"""Admission: a bounded queue before the engine, fair among keys.

Start-time fair queueing (Goyal, Vin, Cheng 1996): each key's next request has a virtual start time, the smallest goes
first, and a request advances its key's clock by cost / priority. A key that floods the queue only delays itself.
Ageing: the longer a key has waited since it was last served, the earlier it is served, so low priorities never starve.

While several keys are active, each leaves some slots to the others, so that a key with few requests does not wait for
another's whole completion: see SLOTS_PER_RESERVED and ACTIVE_WITHIN_S. Preemptible keys come after all others and
reserve no slots: an engine that can preempt accepts the others' requests in addition and takes their slots.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from llamaherd_server.config.keys import Key
from llamaherd_server.errors import ApiError

# A minute of waiting moves a key ahead by 600 tokens, about one chat turn.
AGEING_TOKENS_PER_S = 10.0
# A key leaves one of SLOTS_PER_RESERVED slots, at least one, to keys with a request in the last ACTIVE_WITHIN_S.
SLOTS_PER_RESERVED = 8
ACTIVE_WITHIN_S = 300.0
# Weight of the latest request in the moving average of service times from which Retry-After is computed.
_SMOOTHING = 0.1


@dataclass(eq=False, slots=True)
class Ticket:
    """A place in the queue and then in the engine. `cost` is the expected prompt and completion length in tokens.

    All `slots` are acquired and released together, because two requests that each hold some slots while waiting for
    more could deadlock.
    """

    key: Key
    cost: float
    admitted: asyncio.Future[None]
    slots: int = 1
    started_at: float = math.nan
    left: bool = False


@dataclass(slots=True)
class _Flow:
    """One key's requests. `finish` is the virtual finish time of its last dispatched request."""

    preemptible: bool = False
    waiting: deque[Ticket] = field(default_factory=deque)
    cost: float = 0.0  # of all waiting requests
    running: int = 0
    finish: float = 0.0
    since: float = 0.0
    last_request_at: float = -math.inf


class Admission:
    """Passes requests to the engine: one per slot, and a few more so that a freed slot does not idle."""

    def __init__(
        self,
        *,
        max_queue: int,
        timeout_s: float,
        parallel: int,
        max_queue_tokens: float = math.inf,
        max_generations: int = 128,
        holds: Callable[[Key], bool] = lambda _: True,
        preempts: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_queue = max_queue
        self._max_queue_tokens = max_queue_tokens
        self._max_generations = min(max_generations, max_queue)
        self._timeout_s = timeout_s
        self._holds = holds
        self._preempts = preempts
        self._clock = clock
        self._flows: dict[str, _Flow] = {}
        self._virtual = 0.0
        self._service_s = 1.0
        self.queued = 0
        self.queued_tokens = 0.0
        self.running = 0
        self.set_parallel(parallel)

    def set_parallel(self, parallel: int) -> None:
        """Set the engine's number of slots."""
        self._parallel = parallel
        self.limit = parallel + max(1, parallel // 4)
        self._dispatch()

    def enter(self, key: Key, costs: list[float], slots: int = 1) -> list[Ticket]:
        """Queue one request for each cost, all or none, and return their tickets. Call `leave` for each of them.

        Each takes `slots` at once, or as many as its key may use. If the queue is full, the key with the largest share
        of it gives way: its latest request fails with a 429. If that is this key, raises the 429. An empty queue also
        accepts a request of more tokens than its limit. Raises a 400 for too many generations.
        """
        if (generations := len(costs) * slots) > self._max_generations:
            message = f"{generations} generations in one request (prompts x n): the maximum is {self._max_generations}"
            raise ApiError(400, message, param="n", code="invalid_value")
        flow = self._flows.setdefault(key.name, _Flow())
        total = sum(costs)
        while self.queued and self._share(self.queued + len(costs), self.queued_tokens + total) > 1:
            longest = max(self._flows.values(), key=lambda flow: self._share(len(flow.waiting), flow.cost))
            own = self._share(len(flow.waiting) + len(costs), flow.cost + total)
            if self._share(len(longest.waiting), longest.cost) <= own:
                raise self._full()
            self._evict_latest(longest)
        flow.preemptible = key.preemptible
        flow.last_request_at = now = self._clock()
        if not flow.waiting:
            flow.since = now
            flow.finish = max(flow.finish, self._virtual)
        loop = asyncio.get_running_loop()
        tickets = [Ticket(key, cost, loop.create_future(), slots) for cost in costs]
        flow.waiting.extend(tickets)
        flow.cost += total
        self.queued += len(tickets)
        self.queued_tokens += total
        self._dispatch()
        return tickets

    async def admitted(self, ticket: Ticket) -> None:
        """Wait for the ticket's turn; raises a 503 at the deadline. The caller must still call `leave`."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await ticket.admitted
        except TimeoutError:
            message = f"no slot became free within {self._timeout_s:g} s: the server is overloaded"
            raise ApiError(503, message, code="queue_timeout", retry_after=self._retry_after_s()) from None

    @asynccontextmanager
    async def place(self, ticket: Ticket, used: Callable[[], int]) -> AsyncIterator[None]:
        """Wait like `admitted`; at the end of the block, leave with the token count that `used` returns."""
        try:
            await self.admitted(ticket)
            yield
        finally:
            self.leave(ticket, used())

    def leave(self, ticket: Ticket, tokens: int) -> None:
        """Release the place in the queue or the engine; a second call does nothing.

        The key is charged the actual number of `tokens` instead of the expected cost.
        """
        if ticket.left:
            return
        ticket.left = True
        flow = self._flows[ticket.key.name]
        if math.isnan(ticket.started_at):
            if ticket in flow.waiting:
                flow.waiting.remove(ticket)
                self._unqueue(flow, ticket)
            return
        flow.running -= ticket.slots
        self.running -= ticket.slots
        flow.finish += (tokens - ticket.cost) / ticket.key.priority
        self._service_s += _SMOOTHING * (self._clock() - ticket.started_at - self._service_s)
        self._dispatch()

    def _dispatch(self) -> None:
        while True:
            now = self._clock()
            flows = [
                flow
                for flow in self._flows.values()
                if flow.waiting and flow.running < self._max_running(flow, now) and self._obtainable_slots(flow) > 0
            ]
            if not flows:
                return
            flow = min(flows, key=lambda one: (one.preemptible, one.finish - (now - one.since) * AGEING_TOKENS_PER_S))
            slots = min(flow.waiting[0].slots, self._max_running(flow, now))
            if flow.running + slots > self._max_running(flow, now) or slots > self._obtainable_slots(flow):
                return  # no other request may overtake it, or it could wait forever
            ticket = flow.waiting.popleft()
            self._unqueue(flow, ticket)
            if not self._holds(ticket.key):
                _refuse(ticket, ApiError(401, "the API key was revoked or has expired", code="invalid_api_key"))
                continue
            ticket.slots = slots
            self._virtual = max(self._virtual, flow.finish)
            flow.finish = max(flow.finish, self._virtual) + ticket.cost / ticket.key.priority
            flow.since = ticket.started_at = now
            flow.running += slots
            self.running += slots
            if not ticket.admitted.done():  # the caller was cancelled and is about to leave
                ticket.admitted.set_result(None)

    def _max_running(self, flow: _Flow, now: float) -> int:
        """Return how many slots the key may use: all of them, or those not reserved for other keys."""
        preempts = self._preempts()
        others = [one for one in self._flows.values() if one is not flow and not (preempts and one.preemptible)]
        alone = all(now - other.last_request_at > ACTIVE_WITHIN_S for other in others)
        if alone or (preempts and flow.preemptible) or self._parallel == 1:
            return self.limit
        return self._parallel - max(1, self._parallel // SLOTS_PER_RESERVED)

    def _obtainable_slots(self, flow: _Flow) -> int:
        """Return how many slots the key's requests could get now, counting those that they may preempt."""
        yields = not flow.preemptible and self._preempts()
        return (
            self.limit - self.running + sum(one.running for one in self._flows.values() if yields and one.preemptible)
        )

    def _share(self, requests: int, tokens: float) -> float:
        """Return the fraction of the queue's limits that this load would use; above 1 it does not fit."""
        return max(requests / self._max_queue, tokens / self._max_queue_tokens)

    def _evict_latest(self, flow: _Flow) -> None:
        ticket = flow.waiting.pop()
        self._unqueue(flow, ticket)
        _refuse(ticket, self._full())

    def _unqueue(self, flow: _Flow, ticket: Ticket) -> None:
        flow.cost -= ticket.cost
        self.queued -= 1
        self.queued_tokens -= ticket.cost

    def _retry_after_s(self) -> int:
        return max(1, min(60, math.ceil(self.queued * self._service_s / self._parallel)))

    def _full(self) -> ApiError:
        message = (
            f"the queue is full: {self.queued} requests with {self.queued_tokens:.0f} tokens are waiting; "
            f"the limits are {self._max_queue} and {self._max_queue_tokens:.0f}"
        )
        return ApiError(429, message, code="queue_full", retry_after=self._retry_after_s())


def _refuse(ticket: Ticket, error: ApiError) -> None:
    if not ticket.admitted.done():  # the caller was cancelled and is about to leave
        ticket.admitted.set_exception(error)
