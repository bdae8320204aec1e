"""Common beginnings of prompts, and where they are found."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llamaherd_server.worker.kv import Slot
from llamaherd_server.worker.prefix import WORTH_WAITING, best_source, common, is_coming

from .fake import sequence

tokens = st.lists(st.integers(0, 1), max_size=40)


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
    assert best_source(slots, [1, 2, 3, 4, 5], least=1) == (slots[1], 4)
    assert best_source(slots, [1, 2, 3, 4], least=1) == (slots[1], 3)


def test_a_beginning_that_is_too_short_is_none() -> None:
    assert best_source([holding(0, [1, 2, 3])], [1, 2, 9], least=3) == (None, 0)
    assert best_source([holding(0, [5])], [1, 2], least=1) == (None, 0)


def test_where_there_is_no_slot_to_share_there_is_no_beginning() -> None:
    assert best_source([], [1, 2, 3], least=1) == (None, 0)


def test_only_computed_tokens_count() -> None:
    slot = Slot(0, tokens=[1, 2, 3, 4], cells=[0, 1])
    assert best_source([slot], [1, 2, 3, 4, 5], least=1) == (slot, 2)


def test_a_prompt_that_is_being_computed_is_worth_waiting_for_as_long_as_much_of_it_is_missing() -> None:
    prompt = list(range(100))
    slot = Slot(0, sequence=sequence(1, prompt, 5), tokens=prompt)
    follower = [*prompt[:80], 7, 7]
    assert is_coming([slot], follower, have=0)
    assert is_coming([slot], follower, have=80 - WORTH_WAITING)
    assert not is_coming([slot], follower, have=81 - WORTH_WAITING)
    assert not is_coming([slot], [7, 7, 7], have=0)
    assert not is_coming([holding(0, prompt)], follower, have=0)
