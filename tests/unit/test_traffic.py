"""When status.yml says that a host has other traffic than it was tuned for."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from llamaherd_loadtest.workload import load_workload
from llamaherd_server.serving.metrics import Metrics
from llamaherd_server.wire.protocol import Finished

MEAN = {"prompt": 400, "output": 100}
PROVENANCE = {"workload": "chat", "mean_tokens": MEAN}


def ended(prompt: int, output: int) -> Finished:
    tokens: dict[str, Any] = {"prompt_tokens": prompt, "cached_tokens": 0, "completion_tokens": output}
    return Finished(id=0, reason="stop", prompt_s=0.1, decode_s=0.1, **tokens)


def page(requests: int, prompt: int, output: int) -> str:
    """The server's own page after requests of two keys to m, and one to another model."""
    metrics = Metrics()
    for number in range(requests):
        metrics.finished((f"key {number % 2}", "m"), ended(prompt, output), 1.0)
    metrics.finished(("key 1", "other"), ended(90_000, 1), 1.0)
    return metrics.page().decode()


@pytest.mark.parametrize(
    ("requests", "prompt", "output", "says"),
    [
        (200, 500, 90, []),
        (99, 4000, 100, []),
        (100, 4000, 100, ["prompts of 4000 tokens on average, not 400 as in chat"]),
        (100, 400, 20, ["answers of 20 tokens on average, not 100 as in chat"]),
        (100, 100, 900, ["prompts of 100 tokens on average, not 400 and answers of 900 tokens on average, not 100"]),
    ],
)
def test_a_line_says_what_moved(
    traffic_filters: ModuleType, requests: int, prompt: int, output: int, says: list[str]
) -> None:
    lines = traffic_filters.traffic_moves(page(requests, prompt, output), PROVENANCE, "m")
    assert len(lines) == len(says)
    assert all(words in line for words, line in zip(says, lines, strict=True))


def test_settings_without_a_measured_workload_say_nothing(traffic_filters: ModuleType) -> None:
    assert traffic_filters.traffic_moves(page(100, 4000, 100), {}, "m") == []
    assert traffic_filters.traffic_moves("", PROVENANCE, "m") == []


def test_the_mean_of_a_conversation_grows_with_its_turns() -> None:
    chat, agent = load_workload("chat"), load_workload("agent")
    assert chat.turns is None
    assert chat.mean_tokens["prompt"] >= chat.prompt.median
    assert agent.turns is not None
    assert agent.mean_tokens["prompt"] > agent.prompt.mean + agent.turns.added.mean
