"""The step loop against a context that keeps its own account: random loads, and the rules one by one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaherd_server.wire.engine_settings import EngineSettings, Speculative
from llamaherd_server.wire.errors import DecodeFailed
from llamaherd_server.wire.protocol import Delta, Failed, Finished, Started
from llamaherd_server.worker import arena
from llamaherd_server.worker import scheduler as scheduler_module
from llamaherd_server.worker.prefix import MIN_TOKENS_TO_WAIT_FOR
from llamaherd_server.worker.prompts import PromptCache
from llamaherd_server.worker.scheduler import Scheduler
from llamaherd_server.worker.sequence import Sequence

from .fake import FakeContext, FakeSampler, next_token, sequence

LONGEST_PROMPT, MOST_NEW = 24, 12
TURNS = 3000


@dataclass(frozen=True)
class Arrival:
    turn: int
    prompt: list[int]
    new: int
    cancelled_after: int | None


arrivals = st.lists(
    st.builds(
        Arrival,
        st.integers(0, 30),
        st.lists(st.integers(0, 1), min_size=1, max_size=LONGEST_PROMPT),
        st.integers(1, MOST_NEW),
        st.none() | st.integers(0, 40),
    ),
    max_size=14,
)
ids = st.frozensets(st.integers(0, 13), max_size=2)


@settings(max_examples=400, deadline=None)
@given(
    work=arrivals,
    parallel=st.integers(1, 4),
    ubatch=st.integers(4, 16),
    unified=st.booleans(),
    cells=st.integers(LONGEST_PROMPT + MOST_NEW, 120),
    poison=ids,
    unsampled=ids,
    late_for=st.dictionaries(st.integers(0, 13), st.integers(1, 4), max_size=3),
    aborts=st.frozensets(st.integers(1, 60), max_size=3),
    forgetful=st.booleans(),
    retuned_at=st.none() | st.integers(1, 40),
    recurrent=st.booleans(),
    memory=st.integers(0, 12),
    speculative=st.sampled_from(get_args(Speculative)),
    depth=st.integers(1, 6),
)
def test_every_request_ends_exactly_once_and_the_books_agree(
    work: list[Arrival],
    parallel: int,
    ubatch: int,
    unified: bool,
    cells: int,
    poison: frozenset[int],
    unsampled: frozenset[int],
    late_for: dict[int, int],
    aborts: frozenset[int],
    forgetful: bool,
    retuned_at: int | None,
    recurrent: bool,
    memory: int,
    speculative: Speculative,
    depth: int,
) -> None:
    def context() -> FakeContext:
        faults = {"poison": poison, "unsampled": unsampled, "aborts": aborts}
        context = FakeContext(engine, cells, **faults, late_for=late_for, forgetful=forgetful, ends=True)
        context.cuts = context.stops = not recurrent
        return context

    drafts: dict[str, Any] = {"speculative": speculative, "speculative_depth": depth}
    engine = EngineSettings(parallel=parallel, batch=16, ubatch=ubatch, kv_unified=unified, **drafts)
    backend = context()
    scheduler = Scheduler(backend, prompts=prompt_cache(memory))
    sequences: dict[int, Sequence] = {}
    started: set[int] = set()
    ended: list[int] = []
    cancelled: set[int] = set()
    text = dict.fromkeys(range(len(work)), "")
    for turn in range(TURNS):
        for number, arrival in enumerate(work):
            if arrival.turn == turn:
                sequences[number] = sequence(number, arrival.prompt, arrival.new, late=late_for)
                sequences[number].borders = [len(arrival.prompt) // 2] if recurrent else []
                scheduler.add(sequences[number])
            if arrival.cancelled_after is not None and turn == arrival.turn + arrival.cancelled_after:
                scheduler.cancel(number)
                cancelled |= {number} - set(ended)
        if turn == retuned_at:
            scheduler.preempt_all(keep=not forgetful)
            backend = context()
            scheduler.attach(backend)
        step = scheduler.step()
        for event in step.events:
            assert event.id not in cancelled
            assert event.id not in ended
            if isinstance(event, Started):
                assert event.id not in started
                started.add(event.id)
            elif isinstance(event, Delta):
                text[event.id] += event.text
            else:
                ended.append(event.id)
        assert step.stats.kv_used == backend.used
        assert len({one.slot for one in scheduler.running}) == step.stats.slots_busy
        if len(sequences) == len(work) and scheduler.idle and turn > 75:
            break
    assert scheduler.idle, "somebody starved"
    assert set(ended) | cancelled == set(sequences)
    for number, one in sequences.items():
        assert isinstance(one.sampler, FakeSampler)
        assert one.sampler.closed == 1
        if number in ended and number not in poison | unsampled:
            new = one.tokens[one.n_prompt :]
            assert len(text[number]) == len([token for token in new if token != 3])
            assert new[-1] == 3 or len(one.tokens) == one.limit
            assert number in late_for or says_itself(one)  # drafted or not


def says_itself(one: Sequence) -> bool:
    return all(next_token(one.tokens[:at]) == one.tokens[at] for at in range(one.n_prompt, len(one.tokens)))


def prompt_cache(blobs: int) -> PromptCache:
    """Room for so many."""
    fd = arena.create(blobs << 16)
    try:
        return PromptCache(arena.Arena(fd, blobs << 16), "model")
    finally:
        os.close(fd)


def run(scheduler: Scheduler) -> list[Started | Delta | Finished | Failed]:
    events = []
    while not scheduler.idle:
        events += scheduler.step().events
    return events


def test_running_sequences_come_first_and_a_long_prompt_takes_at_most_one_ubatch() -> None:
    context = FakeContext(EngineSettings(parallel=2, batch=64, ubatch=16), 400)
    scheduler = Scheduler(context)
    scheduler.add(sequence(1, [2], 8))
    scheduler.step()
    scheduler.add(sequence(2, [1] * 100, 1))
    for _ in range(3):
        scheduler.step()
        (first, count), *_ = shares = context.batches[-1]
        assert (first.request.id, count) == (1, 1)
        assert sum(count for _, count in shares) == 16


@pytest.mark.parametrize("unified", [True, False])
def test_who_arrives_together_begins_together_and_a_longer_prompt_does_not_hold_them_up(unified: bool) -> None:
    context = FakeContext(EngineSettings(parallel=4, batch=64, ubatch=16, kv_unified=unified), 400)
    scheduler = Scheduler(context)
    for number, length in enumerate((40, 12, 12, 12)):
        scheduler.add(sequence(number, [number] * length, 5))
    assert scheduler.only_prefilling is False  # no slot is left for another one
    step = scheduler.step()
    assert {event.id for event in step.events if isinstance(event, Delta)} == {1, 2, 3}
    computed = {share[0].request.id: share[1] for shares in context.batches for share in shares if share[1] > 1}
    assert computed == {0: 16, 1: 12, 2: 12, 3: 12}


def test_a_step_of_many_prompts_is_bounded_by_the_time_that_it_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    context = FakeContext(EngineSettings(parallel=8, batch=256, ubatch=32), 2000)
    scheduler = Scheduler(context)

    def tokens_of_first_step(first: int) -> int:
        for number in range(first, first + 8):
            scheduler.add(sequence(number, [number] * 30, 1))
        before = len(context.batches)
        run(scheduler)
        return sum(count for _, count in context.batches[before])

    assert tokens_of_first_step(0) == 240
    monkeypatch.setattr(scheduler_module, "MAX_PREFILL_STEP_S", 0.0)
    assert tokens_of_first_step(8) == 32


def test_it_is_beginning_until_somebody_waits_for_a_second_token() -> None:
    scheduler = Scheduler(FakeContext(EngineSettings(parallel=2, batch=64, ubatch=16), 400))
    assert not scheduler.only_prefilling
    scheduler.add(sequence(1, [1] * 40, 5))
    for _ in range(2):
        assert scheduler.only_prefilling
        scheduler.step()
    scheduler.step()
    assert not scheduler.only_prefilling


def test_with_split_kv_prompts_and_single_tokens_go_in_batches_of_their_own() -> None:
    context = FakeContext(EngineSettings(parallel=3, batch=64, ubatch=16, kv_unified=False), 100)
    scheduler = Scheduler(context)
    for number in range(3):
        scheduler.add(sequence(number, [number] * 8, 5))
        scheduler.step()
    begun = scheduler.step()
    for shares in context.batches:
        counts = {count for _, count in shares}
        assert counts == {1} or len(shares) == 1
    # Whoever has a first token decodes in the next step, so that the slots of a batch are neighbours.
    assert [one.slot for one, _ in context.batches[-1]] == [0, 1, 2]
    assert len([event for event in begun.events if isinstance(event, Delta)]) == 3


def test_with_split_kv_a_first_token_does_not_wait_for_the_others_next_one() -> None:
    context = FakeContext(EngineSettings(parallel=2, batch=64, ubatch=16, kv_unified=False), 100)
    scheduler = Scheduler(context)
    scheduler.add(sequence(1, [1] * 10, 9))
    scheduler.step()
    scheduler.step()
    scheduler.add(sequence(2, [2] * 10, 9))
    told = [[event.id for event in scheduler.step().events if isinstance(event, Delta)] for _ in range(2)]
    assert told == [[2], [1, 2]]


@pytest.mark.parametrize("unified", [True, False])
def test_followers_wait_for_the_prefix_that_a_leader_is_computing(unified: bool) -> None:
    context = FakeContext(EngineSettings(parallel=4, batch=64, ubatch=16, kv_unified=unified), 400)
    scheduler = Scheduler(context)
    system = [1] * 99 + [0]
    for number in range(4):
        scheduler.add(sequence(number, [*system, number], 2))
    started = [event for event in run(scheduler) if isinstance(event, Started)]
    assert started[0].cached_tokens == 0
    assert all(event.cached_tokens > len(system) - MIN_TOKENS_TO_WAIT_FOR for event in started[1:])
    computed = sum(count for shares in context.batches for _, count in shares)
    assert computed < len(system) + 4 * MIN_TOKENS_TO_WAIT_FOR + 8


def test_a_cancelled_leader_leaves_its_place_to_a_follower() -> None:
    scheduler = Scheduler(FakeContext(EngineSettings(parallel=2, batch=64, ubatch=16), 400))
    prompt = [1] * 100
    for number in (1, 2):
        scheduler.add(sequence(number, [*prompt, number], 2))
    scheduler.step()
    scheduler.cancel(1)
    assert [event.id for event in run(scheduler) if isinstance(event, Finished)] == [2]


def test_with_split_kv_a_short_prefix_is_taken_over_in_place_and_not_copied() -> None:
    scheduler = Scheduler(FakeContext(EngineSettings(parallel=2, batch=64, ubatch=16, kv_unified=False), 100))
    cached = []
    for number, prompt in enumerate([[1, 2, 3], [1, 2, 3], [7], [1, 2, 3, 2, 5], [1, 7, 7, 7, 7, 7]]):
        one = sequence(number, prompt, 2)
        scheduler.add(one)
        run(scheduler)
        cached.append(one.cached)
    assert cached == [0, 2, 0, 4, 0]


def test_only_requests_of_the_same_scope_share_a_prefix() -> None:
    scheduler = Scheduler(FakeContext(EngineSettings(parallel=4, batch=64, ubatch=16), 400))
    prompt = list(range(40))
    cached = {}
    for number, scope in enumerate(["a", "b", "a", ""]):
        one = sequence(number, prompt, 2)
        one.request.cache_scope = scope
        scheduler.add(one)
        scheduler.step()  # the first ones still run when the next ones come
        cached[number] = one
    run(scheduler)
    assert [one.cached > 0 for one in cached.values()] == [False, False, True, False]


def test_a_request_that_wants_no_cache_computes_its_whole_prompt() -> None:
    scheduler = Scheduler(FakeContext(EngineSettings(parallel=2, batch=64, ubatch=64), 400))
    for number in (1, 2):
        one = sequence(number, [1] * 50, 2)
        one.request = msgspec.structs.replace(one.request, cache_prompt=False)
        scheduler.add(one)
    assert [event.cached_tokens for event in run(scheduler) if isinstance(event, Started)] == [0, 0]


def test_the_youngest_is_parked_when_cells_run_short_and_all_complete() -> None:
    scheduler = Scheduler(FakeContext(EngineSettings(parallel=3, batch=64, ubatch=16), 120))
    for number in range(3):
        scheduler.add(sequence(number, [number, 2], 100))
    parked: list[int] = []
    finished: list[int] = []
    while not scheduler.idle:
        step = scheduler.step()
        parked += [one.request.id for one in scheduler.waiting if one.started]
        finished += [event.id for event in step.events if isinstance(event, Finished)]
    assert sorted(finished) == [0, 1, 2]
    assert finished[0] == 0
    assert 0 not in parked
    assert step.stats.preemptions > 0


def test_cells_that_only_cache_go_before_anyone_is_parked() -> None:
    scheduler = Scheduler(FakeContext(EngineSettings(parallel=2, batch=64, ubatch=64), 100))
    scheduler.add(sequence(1, [0] * 60, 1))
    run(scheduler)
    scheduler.add(sequence(2, [1] * 80, 10))
    run(scheduler)
    assert scheduler.step().stats.preemptions == 0


def test_one_sequence_that_does_not_fit_alone_is_fatal() -> None:
    scheduler = Scheduler(FakeContext(EngineSettings(parallel=1, batch=64, ubatch=64), 20))
    scheduler.add(sequence(1, [0] * 30, 1))
    with pytest.raises(DecodeFailed, match="30 tokens"):
        scheduler.step()
