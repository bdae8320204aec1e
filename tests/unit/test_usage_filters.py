"""Servers' usage summed up, and as CSV."""

from __future__ import annotations

from types import ModuleType
from typing import Any


def test_rows_are_by_month_and_csv_is_quoted(usage_filters: ModuleType) -> None:
    def page(start: int, **counts: int) -> dict[str, Any]:
        names = ("num_model_requests", "input_tokens", "input_cached_tokens", "output_tokens")
        result = {"api_key_id": "k", "model": 'a,"b"', **dict.fromkeys(names, 0), **counts}
        return {"data": [{"start_time": start, "results": [result]}]}

    january, day = 1767225600, 86400
    pages = [page(january, input_tokens=1), page(january + 30 * day, input_tokens=2), page(january + 31 * day), {}]
    rows = usage_filters.usage_rows(pages)
    assert rows == [["2026-01", "k", 'a,"b"', 0, 3, 0, 0], ["2026-02", "k", 'a,"b"', 0, 0, 0, 0]]
    assert usage_filters.to_csv(rows[:1]) == '2026-01,k,"a,""b""",0,3,0,0\n'
