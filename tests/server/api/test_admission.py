"""The queue alone, with a clock of its own: bounds, order, deadline."""

from __future__ import annotations

import asyncio
import heapq
import math
from dataclasses import dataclass, field
from statistics import quantiles

import pytest

from llamaherd_server.config.keys import Key
from llamaherd_server.errors import ApiError
from llamaherd_server.serving.admission import Admission, Ticket


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def key(name: str, priority: float = 1.0, *, preemptible: bool = False) -> Key:
    return Key(name=name, sha256="", priority=priority, preemptible=preemptible)


def queue(
    parallel: int = 1,
    max_queue: int = 1000,
    max_queue_tokens: float = math.inf,
    clock: Clock | None = None,
    *,
    preempts: bool = True,
) -> Admission:
    return Admission(
        max_queue=max_queue,
        max_queue_tokens=max_queue_tokens,
        max_generations=max_queue,
        timeout_s=60,
        parallel=parallel,
        clock=clock or Clock(),
        preempts=lambda: preempts,
    )


def running(tickets: list[Ticket]) -> list[Ticket]:
    return [ticket for ticket in tickets if ticket.admitted.done() and not ticket.admitted.exception()]


def order(admission: Admission, tickets: list[Ticket]) -> list[str]:
    """The keys in the order in which their tickets are let in, when those that run end one by one."""
    entered = running(tickets)
    for ended in entered:  # grows while it is walked
        admission.leave(ended, int(ended.cost))
        entered += [ticket for ticket in running(tickets) if ticket not in entered]
    return [ticket.key.name for ticket in entered]


async def test_a_place_is_given_back_once_by_whoever_is_first() -> None:
    admission = queue(parallel=8)
    tickets = admission.enter(key("a"), [1.0] * 3)
    async with admission.place(tickets[0], lambda: 1):
        assert admission.running == 3
    for ticket in tickets[:2]:
        admission.leave(ticket, 0)
    assert admission.running == 1


async def test_lets_in_a_quarter_more_than_the_slots() -> None:
    admission = queue(parallel=8)
    tickets = admission.enter(key("a"), [1.0] * 20)
    assert len(running(tickets)) == 10
    assert (admission.running, admission.queued) == (10, 10)


async def test_follows_a_change_of_slots() -> None:
    admission = queue(parallel=1)
    tickets = admission.enter(key("a"), [1.0] * 10)
    admission.set_parallel(4)
    assert len(running(tickets)) == 5


async def test_a_flood_delays_another_key_by_one_request() -> None:
    admission = queue()
    flood = admission.enter(key("flood"), [100.0] * 200)
    light = admission.enter(key("light"), [100.0])
    # two of the flood run already (a slot and the lookahead), then it is the light key's turn
    assert order(admission, flood + light).index("light") == 2


@dataclass(order=True)
class Slot:
    """A request in the engine, in virtual time."""

    ends: float
    ticket: Ticket = field(compare=False)


def ttft_p95(flooding: bool) -> float:
    """Of a key that sends a request every 4 s, over 4 slots: prompts take 0.2 s, completions 3 s.

    The engine starts requests in the order they come, as soon as there is a slot. The flood of 200 comes at 20 s.
    """
    clock = Clock()
    admission = queue(parallel=4, clock=clock)
    light: dict[Ticket, float] = {}
    waiting: list[Ticket] = []
    flood: list[Ticket] = []
    slots: list[Slot] = []
    ttft = []
    for tick in range(1200):  # tenths of a second
        clock.now = tick / 10
        if tick == 200 and flooding:
            flood = [admission.enter(key("flood"), [150.0])[0] for _ in range(200)]
        if tick % 40 == 0:
            light[admission.enter(key("light"), [150.0])[0]] = clock.now
        while slots and slots[0].ends <= clock.now:
            admission.leave(heapq.heappop(slots).ticket, 150)
        waiting += [ticket for ticket in running([*light, *flood]) if ticket.started_at == clock.now]
        while waiting and len(slots) < 4:
            ticket = waiting.pop(0)
            heapq.heappush(slots, Slot(clock.now + 3.2, ticket))
            if ticket in light and light[ticket] > 20:
                ttft.append(clock.now - light[ticket] + 0.2)
    assert len(ttft) > 20
    assert bool(flood) is flooding
    return quantiles(ttft, n=20)[-1]


async def test_a_flood_does_not_double_another_keys_ttft() -> None:
    assert ttft_p95(flooding=True) <= 2 * ttft_p95(flooding=False)


async def test_a_key_has_all_slots_while_it_is_alone_and_leaves_one_otherwise() -> None:
    clock = Clock()
    admission = queue(parallel=4, clock=clock)
    admission.leave(admission.enter(key("other"), [1.0])[0], 1)
    tickets = admission.enter(key("a"), [1.0] * 20)
    assert len(running(tickets)) == 3
    clock.now = 301
    admission.leave(tickets[0], 1)
    assert len(running(tickets[1:])) == 5


async def test_shares_follow_priorities() -> None:
    admission = queue()
    tickets = admission.enter(key("low", 1), [100.0] * 40) + admission.enter(key("high", 3), [100.0] * 40)
    first = order(admission, tickets)[2:22]
    assert 14 <= first.count("high") <= 16


async def test_a_low_priority_ages_to_its_turn() -> None:
    clock = Clock()
    admission = queue(clock=clock)
    high = admission.enter(key("high", 100), [100.0] * 50)
    low = admission.enter(key("low", 0.01), [100.0, 100.0])
    admission.leave(high[0], 100)  # low's first is let in: its clock is now 10,000 tokens ahead of high's
    for ended in high[1:25]:  # without ageing, the other takes 10,000 of high's
        clock.now += 60
        admission.leave(ended, 100)
    assert len(running(low)) == 2


async def test_what_a_request_really_used_is_put_right() -> None:
    admission = queue()
    first = admission.enter(key("cheap"), [1000.0])
    other = admission.enter(key("dear"), [1000.0])
    waiting = admission.enter(key("dear"), [10.0]) + admission.enter(key("cheap"), [10.0])
    admission.leave(first[0], 10)  # it was expected to take 1000 tokens, as the other one still is
    assert [ticket.key.name for ticket in running(waiting)] == ["cheap"]
    admission.leave(other[0], 1000)


async def test_a_full_queue_refuses_with_retry_after() -> None:
    admission = queue(max_queue=2)
    admission.enter(key("a"), [1.0] * 2)
    admission.enter(key("a"), [1.0] * 2)
    with pytest.raises(ApiError) as refused:
        admission.enter(key("a"), [1.0])
    assert refused.value.status_code == 429
    assert int((refused.value.headers or {})["Retry-After"]) >= 1


async def test_a_full_queue_makes_room_for_a_key_with_less_in_it() -> None:
    admission = queue(max_queue=10)
    flood = admission.enter(key("flood"), [1.0] * 2) + admission.enter(key("flood"), [1.0] * 10)
    light = admission.enter(key("light"), [1.0])
    with pytest.raises(ApiError, match="queue is full"):
        await admission.admitted(flood[-1])
    admission.leave(flood[-1], 0)
    admission.leave(flood[0], 1)
    assert running(light)


async def test_the_queue_is_bounded_in_tokens_too() -> None:
    admission = queue(max_queue_tokens=1000)
    held = admission.enter(key("a"), [5000.0, 5000.0])  # both run
    whole = admission.enter(key("a"), [5000.0])[0]  # more than the bound, into an empty queue
    with pytest.raises(ApiError, match="1 requests with 5000 tokens are waiting; the limits are 1000 and 1000"):
        admission.enter(key("a"), [1.0])
    admission.enter(key("b"), [600.0])  # pushes out what is more than its own
    with pytest.raises(ApiError, match="queue is full"):
        await admission.admitted(whole)
    admission.leave(whole, 0)
    assert (admission.queued, admission.queued_tokens) == (1, 600.0)
    admission.leave(held[0], 5000)
    assert (admission.queued, admission.queued_tokens) == (0, 0.0)


async def test_more_than_the_queue_can_ever_hold_is_a_400() -> None:
    with pytest.raises(ApiError, match="11 generations in one request") as refused:
        queue(max_queue=10).enter(key("a"), [1.0] * 11)
    assert refused.value.status_code == 400


async def test_the_deadline_is_a_503_and_frees_the_place() -> None:
    admission = Admission(max_queue=10, timeout_s=0.01, parallel=1)
    admission.enter(key("a"), [1.0] * 2)
    late = admission.enter(key("a"), [1.0])[0]
    with pytest.raises(ApiError) as refused:
        await admission.admitted(late)
    admission.leave(late, 0)
    assert refused.value.status_code == 503
    assert admission.queued == 0


async def test_a_caller_that_has_gone_leaves_no_slot_behind() -> None:
    admission = queue()
    held = admission.enter(key("a"), [1.0] * 2)
    gone = admission.enter(key("a"), [1.0])[0]
    waiting = asyncio.ensure_future(admission.admitted(gone))
    await asyncio.sleep(0)
    waiting.cancel()
    admission.leave(held[0], 1)  # hands the place to the one that is being cancelled
    await asyncio.gather(waiting, return_exceptions=True)
    admission.leave(gone, 0)
    assert (admission.running, admission.queued) == (1, 0)


async def test_a_request_of_several_slots_gets_them_together_or_none() -> None:
    admission = queue(parallel=4)  # and one that waits in the engine
    [first] = admission.enter(key("a"), [1.0], slots=3)
    [second] = admission.enter(key("a"), [1.0], slots=3)
    [third] = admission.enter(key("a"), [1.0])
    assert running([first, second, third]) == [first]
    admission.leave(first, 1)
    assert running([second, third]) == [second, third]
    assert admission.running == 4


async def test_a_request_of_more_slots_than_there_are_runs_alone() -> None:
    admission = queue(parallel=2)
    [small] = admission.enter(key("a"), [1.0])
    [large] = admission.enter(key("a"), [1.0], slots=9)
    assert running([large]) == []
    admission.leave(small, 1)
    assert running([large]) == [large]
    admission.leave(large, 1)
    assert admission.running == 0


async def test_requests_of_several_slots_never_wait_for_each_other() -> None:
    admission = queue(parallel=4)
    tickets = [admission.enter(key(name), [1.0], slots=3)[0] for name in "abcabc"]
    assert sorted(order(admission, tickets)) == sorted("abcabc")


async def test_preemptible_ones_fill_the_engine_and_others_get_in_beside_them() -> None:
    admission = queue(parallel=4)
    batch = admission.enter(key("batch", preemptible=True), [1.0] * 9)
    assert len(running(batch)) == admission.limit == 5
    chats = admission.enter(key("chat"), [1.0] * 9)
    assert len(running(chats)) == 5, "nobody else but preemptible ones: it need leave nothing"
    admission.leave(batch[0], 1)
    assert len(running(batch)) == 5
    for ticket in chats[:4]:
        admission.leave(ticket, 1)
    assert (len(running(chats)), len(running(batch))) == (9, 5)
    for ticket in [*chats[4:], *batch[1:5]]:
        admission.leave(ticket, 1)
    assert len(running(batch)) == 9


async def test_where_the_engine_does_not_preempt_they_come_last_but_are_not_passed() -> None:
    admission = queue(parallel=4, preempts=False)
    batch = admission.enter(key("batch", preemptible=True), [1.0] * 9)
    assert len(running(batch)) == 5
    chats = admission.enter(key("chat"), [1.0] * 2)
    assert not running(chats)
    for ticket in batch[:3]:
        admission.leave(ticket, 1)
    assert len(running(chats)) == 2
