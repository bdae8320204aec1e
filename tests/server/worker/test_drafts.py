"""What is proposed, and that proposals stop where they do not pay."""

from __future__ import annotations

import random
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaherd_server.wire.engine_settings import EngineSettings, Speculative
from llamaherd_server.worker.drafts import MAX_ENTRIES, MAX_INDEXED_PER_CALL, SHORT_MATCH, Lookup
from llamaherd_server.worker.scheduler import Scheduler
from llamaherd_server.worker.sequence import Sequence
from llamaherd_server.worker.speculation import (
    ALLOWANCE,
    MAX_MODEL_POOL,
    MAX_POOL,
    MIN_SAMPLES,
    Speculation,
    StepTimes,
    Wanted,
)

from .fake import FakeContext, sequence

PHRASE = list(range(100, 140))


def test_what_followed_before_is_proposed_and_gone_on_with() -> None:
    lookup = Lookup(1000)
    tokens = [*PHRASE, 1, 2, *PHRASE[:3]]
    assert lookup.propose(tokens, 5) == PHRASE[3:8]
    tokens += PHRASE[3:8]  # they came true
    assert lookup.propose(tokens, 4) == PHRASE[8:12]


def test_a_longer_match_goes_before_a_later_one() -> None:
    tokens = [*PHRASE, 7, *PHRASE[7:10], 8, 9, *PHRASE[:10]]
    assert Lookup(1000).propose(tokens, 2) == PHRASE[10:12]


def test_a_period_goes_on() -> None:
    assert Lookup(1000).propose([9, 1, 2, 3, 1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]


@given(tokens=st.lists(st.integers(0, 3), max_size=60), most=st.integers(1, 9))
def test_whatever_is_proposed_followed_the_same_tokens_before(tokens: list[int], most: int) -> None:
    lookup = Lookup(100)
    for end in range(1, len(tokens) + 1):
        there = tokens[:end]
        draft = lookup.propose(there, most)
        assert len(draft) in (0, most)
        seen = any(
            there[at - SHORT_MATCH : at] == there[-SHORT_MATCH:] and draft[: end - at] == there[at : at + most]
            for at in range(SHORT_MATCH, end)
        )
        assert seen or not draft


def test_a_long_prompt_is_indexed_by_and_by_and_takes_bounded_memory() -> None:
    lookup = Lookup(10**6)
    tokens = [*PHRASE, *range(1000, 1000 + 20 * MAX_INDEXED_PER_CALL), *PHRASE[:20]]
    calls = 0
    while not (draft := lookup.propose(tokens, 4)):
        calls += 1
        assert calls < 25
    assert calls >= 19
    assert draft == PHRASE[20:24]
    assert len(lookup._after) <= MAX_ENTRIES


class Reader:
    """Implements speculation.Source by a clock: it reads a token in `read` s, and drafts one for all in `each`."""

    def __init__(self, read: float, each: float) -> None:
        self.catch_up_s = self.drafting_s = 0.0
        self._read, self._each = read, each
        self._known: dict[int, int] = {}

    def propose(self, wanted: list[Wanted], room: int, worth: float, budget_s: float) -> None:
        self.catch_up_s = 0.0
        for one, most in wanted:
            behind = len(one.tokens) - self._known.get(one.arrival, 0)
            count = min(behind, int((budget_s - self.catch_up_s) / self._read))
            self.catch_up_s += count * self._read
            self._known[one.arrival] = len(one.tokens) - behind + count
            if count == behind:
                one.draft = [7] * min(most, room)
                room -= len(one.draft)
        self.drafting_s = self._each * max(len(one.draft) for one, _ in wanted)


def simulated(
    confirmed: float, cost: float, steps: int, parallel: int = 1, drafts: Reader | None = None, stay: int = 10**6
) -> float:
    """Time with drafts over that without, for sequences whose every draft's token comes true with that chance.

    They are others after `stay` steps each.
    """
    rng = random.Random(1)
    settings = EngineSettings(
        parallel=parallel, speculative="draft" if drafts else "auto", speculative_depth=32, ubatch=512
    )
    backend = FakeContext(settings, 10**6)
    backend.drafts = drafts
    speculation = Speculation()
    speculation.attach(backend)
    took = tokens = 0.0
    sequences: list[Sequence] = []
    for step in range(steps):
        if step % stay == 0:
            sequences = [sequence(number, [1, 2, 3] * 100, 10**6) for number in range(parallel)]
            for one in sequences:
                one.computed = len(one.tokens) - 1
        speculation.draft(sequences, 10**6)
        drafted = sum(len(one.draft) for one in sequences)
        seconds = (1 + cost * drafted / parallel) * rng.choice([1, 1, 1, 1.05, 3])
        took += 1 + cost * drafted / parallel + (drafts.catch_up_s + drafts.drafting_s if drafts else 0)
        if drafts:
            drafts.catch_up_s = drafts.drafting_s = 0.0
        speculation.timed([(one, 1 + len(one.draft)) for one in sequences], seconds)
        for one in sequences:
            accepted = next((at for at in range(len(one.draft)) if rng.random() >= confirmed), len(one.draft))
            speculation.verified(one, accepted)
            tokens += 1 + accepted
    return took * parallel / tokens


@pytest.mark.parametrize("parallel", [1, 4, 16])
@pytest.mark.parametrize("cost", [0.02, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("confirmed", [0.0, 0.2, 0.5])
def test_drafts_that_do_not_come_true_cost_next_to_nothing(confirmed: float, cost: float, parallel: int) -> None:
    steps = 1000
    assert simulated(confirmed, cost, steps, parallel) <= 1 + 1.5 * ALLOWANCE + MAX_POOL / steps


@pytest.mark.parametrize("stay", [10, 200])
@pytest.mark.parametrize("parallel", [1, 4])
@pytest.mark.parametrize("cost", [0.02, 1.0])
@pytest.mark.parametrize("confirmed", [0.0, 0.5])
def test_a_draft_model_that_is_wrong_costs_next_to_nothing(
    confirmed: float, cost: float, parallel: int, stay: int
) -> None:
    """Nor does one that has to read prompts again and again."""
    steps = 1000
    took = simulated(confirmed, cost, steps, parallel, Reader(read=0.01, each=0.1), stay)
    assert took <= 1 + 1.5 * ALLOWANCE + (MAX_MODEL_POOL + MAX_POOL) / (steps * parallel)


def test_a_draft_model_that_is_right_pays_for_what_it_reads() -> None:
    assert simulated(0.9, 0.02, 1000, 1, Reader(read=0.01, each=0.1)) < 0.45
    assert simulated(0.9, 0.02, 1000, 4, Reader(read=0.01, each=0.1), stay=100) < 0.5


@pytest.mark.parametrize(("cost", "expected"), [(0.02, 0.1), (0.3, 0.4), (0.6, 0.7)])
def test_drafts_that_come_true_save_nearly_all_that_they_can(cost: float, expected: float) -> None:
    assert simulated(0.99, cost, 300) < expected


def test_what_was_too_dear_once_is_tried_again() -> None:
    times = StepTimes()
    times.saw(1, 0, 1.0)
    for _ in range(MIN_SAMPLES):
        assert times.cost(1) < 1  # other work may have made one step longer
        times.saw(1, 4, 40.0)
    assert times.cost(1) > 1
    for _ in range(1000):
        times.saw(1, 0, 1.0)
    assert times.cost(1) < 1


def test_a_text_that_repeats_itself_takes_fewer_steps() -> None:
    steps = {}
    for kind in get_args(Speculative):
        scheduler = Scheduler(FakeContext(EngineSettings(speculative=kind), 1000))
        for number in range(4):
            scheduler.add(sequence(number, [number, 2, 2, 2, 2], 40))
        while not scheduler.idle:
            stats = scheduler.step().stats
        steps[kind] = stats.step
        assert (stats.drafted_tokens > 0) == (kind != "off")
    assert steps["off"] == 40
    assert max(steps["ngram"], steps["auto"]) < 20


def test_a_model_that_cannot_drop_rejected_tokens_drafts_nothing() -> None:
    context = FakeContext(EngineSettings(speculative="ngram"), 1000)
    context.cuts, context.draft_depth = False, 0
    scheduler = Scheduler(context)
    scheduler.add(sequence(1, [1, 2, 2, 2, 2], 40))
    while not scheduler.idle:
        stats = scheduler.step().stats
    assert stats.drafted_tokens == 0


def test_drafts_take_the_cells_that_are_left_and_never_preempt() -> None:
    """Each has 5 tokens of a prompt and gets 20, in 50 cells."""
    scheduler = Scheduler(FakeContext(EngineSettings(parallel=2, speculative="ngram"), 50))
    for number in range(2):
        scheduler.add(sequence(number, [number, 2, 2, 2, 2], 20))
    while not scheduler.idle:
        stats = scheduler.step().stats
    assert stats.drafted_tokens > 0
    assert stats.preemptions == 0
