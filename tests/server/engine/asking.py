"""Whole answers from an engine, for tests that do not care how they were streamed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llamaherd_server.engine.embedded import EmbeddedEngine
from llamaherd_server.wire.protocol import Delta, Finished, Generate, ReasoningBudget, Sampling, Started, TokenLogprob

GREEDY = Sampling(temperature=0)
ENDLESS = Sampling(temperature=0, ignore_eos=True)
COUNTRIES = ["France", "Italy", "Spain", "Japan", "Egypt", "Norway", "Peru", "Kenya"]


@dataclass
class Answer:
    finished: Finished
    parts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.parts)


async def ask(
    engine: EmbeddedEngine,
    prompt: str | list[int],
    max_tokens: int | None = 24,
    sampling: Sampling = GREEDY,
    *,
    stop: list[str] | None = None,
    logprobs: int | None = None,
    reasoning: ReasoningBudget | None = None,
) -> Answer:
    """Raises EngineError, as `generate` does."""
    bounds: dict[str, Any] = {"max_tokens": max_tokens, "stop": stop or [], "reasoning": reasoning}
    request = Generate(id=0, prompt=prompt, sampling=sampling, logprobs=logprobs, **bounds)
    parts: list[str] = []
    collected: list[TokenLogprob] = []
    async for event in engine.generate(request):
        if isinstance(event, Delta):
            parts.append(event.text)
            collected += event.logprobs or []
        elif not isinstance(event, Started):
            return Answer(event, parts, collected)
    raise AssertionError("the stream ended without a Finished")
