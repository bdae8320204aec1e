"""The word check finds what it looks for, and nothing in what the project says now."""

from __future__ import annotations

import pytest

from scripts import terms


@pytest.mark.parametrize(
    ("line", "term", "instead"),
    [
        ("sequences are parked", "parked", "preempt"),
        ("Puts back the release", "Puts back", "restore"),
        ("settings in force", "in force", "current, apply"),
    ],
)
def test_a_term_that_left_is_found(line: str, term: str, instead: str) -> None:
    assert list(terms.found(f"fine\n{line}")) == [(2, term, instead)]


@pytest.mark.parametrize("line", ["gather_facts: false", "a commend", "the store keeps it", "Amends"])
def test_other_words_are_left_alone(line: str) -> None:
    assert list(terms.found(line)) == []


def test_the_texts_use_none() -> None:
    assert terms.main() == 0
