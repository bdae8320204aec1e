"""One server for all clients; each test runs once for each engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ..conftest import Server, running

ENGINES: list[dict[str, Any]] = [
    {"kind": "embedded"},
    {"kind": "llama-server", "extra_args": ["--embeddings", "--pooling", "mean"]},
]
TOOL: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="session", params=ENGINES, ids=lambda engine: engine["kind"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the test model on the engine."""
    engine = {"parallel": 2, "ctx_per_slot": 1024, "threads": 1, "threads_batch": 1, **request.param}
    with running(tmp_path_factory.mktemp("clients"), engine=engine) as started:
        yield started
