"""Ends reasoning that has used up its token budget by forcing the marker that closes it."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from llamaherd_server.wire.protocol import ReasoningBudget
from llamaherd_server.worker.sequence import Sampler
from llamaherd_server.worker.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llamaherd_server.worker.samplers import Draw


class BudgetSampler:
    """Implements sequence.Sampler by wrapping another one and forcing its tokens once the budget is used up."""

    def __init__(self, vocabulary: Vocabulary, sampler: Sampler, budget: ReasoningBudget) -> None:
        self._vocabulary = vocabulary
        self._sampler = sampler
        self._begin, self._end = budget.begin.encode(), budget.end.encode()
        self._closing = vocabulary.tokenize(budget.end, add_special=False, parse_special=True)
        self._left = budget.tokens
        self._thinks = budget.begun
        self._emitted = 0  # closing tokens so far
        self._tail = b""

    @property
    def logits(self) -> Any:
        return self._sampler.logits

    @property
    def can_be_late(self) -> bool:
        return self._sampler.can_be_late

    @property
    def top_logits(self) -> int:
        return self._sampler.top_logits

    @property
    def changed(self) -> Collection[int]:
        return self._sampler.changed

    def sample(self, draw: Draw) -> int | None:
        if self._thinks and self._left <= 0:
            self._sampler.force(self._closing[self._emitted])
        return self._track(self._sampler.sample(draw))

    def force(self, token: int) -> None:
        self._sampler.force(token)

    def late(self, wait_s: float) -> int | None:
        return self._track(self._sampler.late(wait_s))

    def close(self) -> None:
        self._sampler.close()

    def _track(self, token: int | None) -> int | None:
        """Track where reasoning begins and ends; if a grammar replaced a closing token, start the marker again."""
        if token is None:
            return None
        self._tail = (self._tail + self._vocabulary.piece(token, special=True))[
            -max(len(self._begin), len(self._end)) :
        ]
        if self._thinks:
            closes = self._left <= 0 and token == self._closing[self._emitted]
            self._emitted = self._emitted + 1 if closes else 0
            self._left -= 1
            self._thinks = self._emitted < len(self._closing) and not self._tail.endswith(self._end)
        elif self._begin and self._tail.endswith(self._begin):
            self._thinks = True
        return token
