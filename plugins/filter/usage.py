"""Filters for the responses of GET /v1/usage: sums over servers, and CSV."""

from __future__ import annotations

import csv
import datetime
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_COUNTS = ("num_model_requests", "input_tokens", "input_cached_tokens", "output_tokens")


def usage_rows(pages: Iterable[Mapping[str, Any]]) -> list[list[Any]]:
    """Return rows of month, key, model and counts, summed over pages. A page without data is skipped."""
    sums: Counter[tuple[str, str, str, str]] = Counter()
    rows = set()
    for bucket in (bucket for page in pages for bucket in page.get("data", ())):
        month = datetime.datetime.fromtimestamp(bucket["start_time"], datetime.UTC).strftime("%Y-%m")
        for one in bucket["results"]:
            rows.add(row := (month, one["api_key_id"], one["model"]))
            sums.update({(*row, count): one[count] for count in _COUNTS})
    return [[*row, *(sums[(*row, count)] for count in _COUNTS)] for row in sorted(rows)]


def to_csv(rows: Iterable[Sequence[Any]]) -> str:
    """Format the rows as in RFC 4180, except for the line ends (LF)."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"usage_rows": usage_rows, "to_csv": to_csv}
