"""Server-sent events as a client that trusts nobody reads them."""

from __future__ import annotations

import json
from typing import Any


def events_of(text: str, *, done: bool = True) -> list[Any]:
    """The JSON of each event's data, which is one line; comments are left out. The last is [DONE] where `done`."""
    *events, end = text.split("\n\n")
    assert end == "", f"the stream ends within an event: {end!r}"
    data = [line.removeprefix("data: ") for event in events for line in event.split("\n") if line.startswith("data: ")]
    assert ("[DONE]" in data, "[DONE]" in data[:-1]) == (done, False)
    return [json.loads(one) for one in data[: -1 if done else None]]
