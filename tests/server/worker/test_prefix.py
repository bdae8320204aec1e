"""Common beginnings of prompts, and where they are found."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.worker.kv import KvCache, Slot
from llamaherd_server.worker.prefix import MIN_TOKENS_TO_WAIT_FOR, best_source, common, is_coming

from .fake import FakeContext, sequence

tokens = st.lists(st.integers(0, 1), max_size=40)


def best(slots: list[Slot], prompt: list[int]) -> tuple[Slot | None, int]:
    return best_source(KvCache(FakeContext(EngineSettings(parallel=2), 100)), slots, prompt)


def holding(number: int, held: list[int]) -> Slot:
    return Slot(number, tokens=held, cells=list(range(len(held))))


@given(tokens, tokens, tokens)
def test_common_is_the_length_of_the_longest_common_beginning(start: list[int], a: list[int], b: list[int]) -> None:
    one, other = start + a, start + b
    length = common(one, other)
    assert one[:length] == other[:length]
    assert length == min(len(one), len(other)) or one[length] != other[length]


def test_the_longest_beginning_wins_and_one_token_is_left_to_compute() -> None:
    slots = [holding(0, [1, 2]), holding(1, [1, 2, 3, 4]), holding(2, [9])]
    assert best(slots, [1, 2, 3, 4, 5]) == (slots[1], 4)
    assert best(slots, [1, 2, 3, 4]) == (slots[1], 3)


def test_where_nothing_is_common_there_is_no_source() -> None:
    assert best([holding(0, [5])], [1, 2]) == (None, 0)
    assert best([], [1, 2, 3]) == (None, 0)


def test_only_computed_tokens_count() -> None:
    slot = Slot(0, tokens=[1, 2, 3, 4], cells=[0, 1])
    assert best([slot], [1, 2, 3, 4, 5]) == (slot, 2)


def test_a_prompt_that_is_being_computed_is_worth_waiting_for_as_long_as_much_of_it_is_missing() -> None:
    prompt = list(range(100))
    slot = Slot(0, sequence=sequence(1, prompt, 5), tokens=prompt)
    follower = [*prompt[:80], 7, 7]
    assert is_coming([slot], follower, have=0)
    assert is_coming([slot], follower, have=80 - MIN_TOKENS_TO_WAIT_FOR)
    assert not is_coming([slot], follower, have=81 - MIN_TOKENS_TO_WAIT_FOR)
    assert not is_coming([slot], [7, 7, 7], have=0)
    assert not is_coming([holding(0, prompt)], follower, have=0)
