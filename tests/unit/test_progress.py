"""The line that a long command shows of itself."""

from __future__ import annotations

from types import ModuleType

import pytest


@pytest.mark.parametrize(
    ("line", "seconds", "expected"),
    [
        ("[120/224] Building CXX object ggml/src/x.o", 192, "[120/224] 53 % 3m12s"),
        ("[224/224] Linking", 9.9, "[224/224] 100 % 9s"),
        ("12 % of 94 MiB, 40.0 MiB/s", 3, "12 % of 94 MiB, 40.0 MiB/s 3s"),
        ("", 61, "1m01s"),
    ],
)
def test_a_line_says_how_far_and_how_long(progress: ModuleType, line: str, seconds: float, expected: str) -> None:
    assert progress.summary(line, seconds) == expected
