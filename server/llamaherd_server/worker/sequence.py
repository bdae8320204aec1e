"""One request inside the worker: its tokens, how far they are computed, and what of its text has been sent."""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from llamaherd_server.wire.errors import RequestError
from llamaherd_server.wire.protocol import Finished, FinishReason, Generate
from llamaherd_server.wire.text import TextStream
from llamaherd_server.worker.speculation import Drafter
from llamaherd_server.worker.texts import Stretch

if TYPE_CHECKING:
    from llamaherd_server.worker.samplers import Draw

NO_SLOT = -1
_arrivals = itertools.count()


class Sampler(Protocol):
    """Takes the tokens of one request: sampling.NativeSampler; grammar.GrammarSampler, which may be late; or either of
    them within reasoning.BudgetSampler.
    """

    @property
    def logits(self) -> Any:
        """Those of a token that is late."""

    @property
    def can_be_late(self) -> bool:
        """Whether `sample` may have no token yet; it has none for a draft then."""

    @property
    def few(self) -> int:
        """How many of the highest logits the next token depends on, beside those of `changed`; 0: on all."""

    @property
    def changed(self) -> Collection[int]:
        """The tokens whose logits a chain may change by more than all others'."""

    def sample(self, draw: Draw) -> int | None: ...

    def force(self, token: int) -> None: ...

    def late(self, wait_s: float) -> int | None: ...

    def close(self) -> None: ...


@dataclass(eq=False, slots=True)
class Sequence:
    """`tokens` is the prompt and all that was sampled; the first `computed` of them are in the KV cells of `slot`.

    It may grow to `limit` tokens, which the slot's size decides too. `draft` is computed beside the last token in the
    hope that sampling gives the same; `drafter` proposes it. `state` holds its KV cells while it is parked.
    `borders` are the lengths at which another prompt is likely to go another way.
    Sequences order by `turn`.
    """

    request: Generate
    tokens: list[int]
    sampler: Sampler
    text: TextStream
    preserved: frozenset[int] = frozenset()  # control tokens that are text here
    borders: list[int] = field(default_factory=list)
    texts: list[Stretch] = field(default_factory=list)
    limit: int = 0
    draft: list[int] = field(default_factory=list)
    drafter: Drafter | None = None
    n_prompt: int = field(init=False)
    slot: int = NO_SLOT
    computed: int = 0
    cached: int = 0
    started: bool = False
    state: bytes | None = None
    arrival: int = field(default_factory=lambda: next(_arrivals))
    _began: float = 0.0
    _first: float = 0.0

    def __post_init__(self) -> None:
        self.n_prompt = len(self.tokens)

    @property
    def turn(self) -> tuple[bool, int]:
        """Preemptible ones come after all others; each kind by arrival."""
        return self.request.preemptible, self.arrival

    @property
    def id(self) -> int:
        return self.request.id

    @property
    def pending(self) -> int:
        """Tokens not yet computed; 1 while it generates, 0 while its next token is late."""
        return len(self.tokens) - self.computed

    @property
    def decoding(self) -> bool:
        return 0 < self.computed == len(self.tokens) - 1

    @property
    def to_border(self) -> int:
        """How many pending tokens there are before the next border, or in all."""
        return next((border - self.computed for border in self.borders if border > self.computed), self.pending)

    def space_borders(self, apart: int) -> None:
        """Leave out borders that are less than `apart` tokens after what there is, or after another."""
        last, spaced = self.computed, []
        for border in self.borders:
            if border - last >= apart:
                spaced.append(border)
                last = border
        self.borders = spaced

    def begin(self, cached: int) -> None:
        """It has a slot for the first time; `cached` tokens of its prompt were found in the KV cells."""
        self.started = True
        self.cached = cached
        self._began = time.perf_counter()

    def append(self, token: int) -> None:
        self._first = self._first or time.perf_counter()
        self.tokens.append(token)

    def finished(self, reason: FinishReason) -> Finished:
        now = time.perf_counter()
        return Finished(
            id=self.request.id,
            reason=reason,
            prompt_tokens=self.n_prompt,
            cached_tokens=self.cached,
            completion_tokens=len(self.tokens) - self.n_prompt,
            prompt_s=self._first - self._began,
            decode_s=now - self._first,
            stop=self.text.stop,
            drafted_tokens=self.drafter.drafted if self.drafter else 0,
            accepted_tokens=self.drafter.accepted if self.drafter else 0,
        )


Drawn: TypeAlias = int | RequestError | None
"""A token; None: it is late; or why the sequence has none."""

Share: TypeAlias = tuple[Sequence, int]
"""A part of a batch: how many of a sequence's pending tokens are computed, or its last one and its draft."""

Row: TypeAlias = tuple[Sequence, int]
"""A sequence, and the row of the last batch that its next token comes from."""
