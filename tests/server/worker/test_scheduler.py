"""Random arrivals, lengths, cancels and KV sizes against a fake context that keeps its own account of cells."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaherd_server.protocol import EngineSettings, Failed, Finished, Generate, Started, TokenLogprob
from llamaherd_server.worker.prefix import WORTH_WAITING
from llamaherd_server.worker.scheduler import DONE, NO_ROOM, Scheduler
from llamaherd_server.worker.sequence import Sequence
from llamaherd_server.worker.text import TextStream


class FakeSampler:
    chain = None
    closed = False

    def close(self) -> None:
        assert not self.closed, "closed twice"
        self.closed = True


class FakeContext:
    """Cells by slot as llama.cpp would hold them; decode fails with NO_ROOM, changing nothing, when they are spent."""

    def __init__(self, engine: EngineSettings, cells: int) -> None:
        self.settings = engine
        self.size = cells
        self.cells: dict[int, list[int]] = {slot: [] for slot in range(engine.parallel)}
        self.batches: list[list[tuple[Sequence, int]]] = []

    def decode(self, shares: list[tuple[Sequence, int]]) -> int:
        new = sum(share for _, share in shares)
        assert 0 < new <= self.settings.batch
        if sum(map(len, self.cells.values())) + new > self.size:
            return NO_ROOM
        for sequence, share in shares:
            cells = self.cells[sequence.slot]
            assert cells == sequence.tokens[: sequence.computed], "the KV cells are not what the scheduler thinks"
            cells += sequence.tokens[sequence.computed : sequence.computed + share]
        self.batches.append(shares)
        return DONE

    def sample(self, chain: Any, row: int) -> int:
        return 7

    def logprob(self, row: int, token: int, top: int) -> TokenLogprob:
        raise AssertionError("nobody asked")

    def piece(self, token: int) -> bytes:
        return b"x"

    def is_eog(self, token: int) -> bool:
        return False

    def forget(self, slot: int, start: int = 0) -> None:
        del self.cells[slot][start:]

    def share(self, source: int, target: int, length: int) -> None:
        assert self.cells[target] == []
        self.cells[target] = self.cells[source][:length]


def sequence(number: int, prompt: list[int], new: int) -> Sequence:
    request = Generate(id=number, prompt=prompt, max_tokens=new)
    return Sequence(request, list(prompt), FakeSampler(), TextStream([]), len(prompt) + new)  # type: ignore[arg-type]


prompts = st.lists(st.integers(0, 1), min_size=1, max_size=24)
arrivals = st.lists(
    st.tuples(st.integers(0, 30), prompts, st.integers(1, 12), st.none() | st.integers(0, 40)), max_size=14
)


@settings(max_examples=300, deadline=None)
@given(arrivals, st.integers(1, 4), st.integers(4, 16), st.booleans(), st.integers(36, 160))
def test_every_request_ends_exactly_once_and_the_cells_add_up(
    work: list[tuple[int, list[int], int, int | None]], parallel: int, ubatch: int, unified: bool, cells: int
) -> None:
    engine = EngineSettings(parallel=parallel, batch=max(16, ubatch), ubatch=ubatch, kv_unified=unified)
    context = FakeContext(engine, cells)
    scheduler = Scheduler(context)
    sequences = {number: sequence(number, prompt, new) for number, (_, prompt, new, _) in enumerate(work)}
    ended: dict[int, int] = {}
    cancelled: set[int] = set()
    for turn in range(2000):
        for number, (arrival, _, _, cancel) in enumerate(work):
            if arrival == turn:
                scheduler.waiting.append(sequences[number])
            if cancel is not None and turn == arrival + cancel and number not in ended:
                scheduler.cancel(number)
                cancelled.add(number)
        step = scheduler.step()
        for event in step.events:
            assert event.id not in cancelled
            if isinstance(event, Finished | Failed):
                ended[event.id] = ended.get(event.id, 0) + 1
        assert step.stats.kv_used <= cells
        assert sorted({one.slot for one in scheduler.running}) == sorted(one.slot for one in scheduler.running)
        if turn > 75 and scheduler.idle:
            break
    assert scheduler.idle, "somebody starved"
    assert set(ended) | cancelled == set(sequences)
    assert all(count == 1 for count in ended.values())
    for number, one in sequences.items():
        assert one.sampler.closed  # type: ignore[attr-defined]
        if number in ended and number not in cancelled:
            assert len(one.tokens) == one.limit


def test_running_sequences_come_first_and_a_long_prompt_takes_at_most_one_ubatch() -> None:
    context = FakeContext(EngineSettings(parallel=2, batch=64, ubatch=16), 400)
    scheduler = Scheduler(context)
    scheduler.waiting.append(sequence(1, [1], 50))
    scheduler.step()
    scheduler.waiting.append(sequence(2, [2] * 100, 1))
    for _ in range(3):
        scheduler.step()
        shares = context.batches[-1]
        assert shares[0][1] == 1
        assert shares[0][0].request.id == 1
        assert sum(share for _, share in shares) <= 16


def test_followers_wait_for_the_prefix_that_a_leader_is_computing() -> None:
    context = FakeContext(EngineSettings(parallel=4, batch=64, ubatch=16), 2000)
    scheduler = Scheduler(context)
    system = list(range(100, 200))
    for number in range(4):
        scheduler.waiting.append(sequence(number, [*system, number], 2))
    started: list[Started] = []
    while not scheduler.idle:
        started += [event for event in scheduler.step().events if isinstance(event, Started)]
    assert started[0].cached_tokens == 0
    assert all(event.cached_tokens > 100 - WORTH_WAITING for event in started[1:])


def test_attaching_another_context_computes_running_sequences_again() -> None:
    engine = EngineSettings(parallel=2, batch=64, ubatch=16)
    scheduler = Scheduler(FakeContext(engine, 400))
    one = sequence(1, [1, 2, 3], 10)
    scheduler.waiting.append(one)
    scheduler.step()
    scheduler.park_all()
    scheduler.attach(FakeContext(msgspec.structs.replace(engine, parallel=1), 400))
    events = []
    while not scheduler.idle:
        events += scheduler.step().events
    assert len(one.tokens) == 13
    assert not any(isinstance(event, Started) for event in events)
    assert isinstance(events[-1], Finished)
    assert events[-1].completion_tokens == 10
