"""One generation request inside the worker: its tokens, how many are computed, and its text so far."""

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
    """Samples the tokens of one request: sampling.NativeSampler; grammar.GrammarSampler, which may be late; or one of
    these wrapped in reasoning.BudgetSampler.
    """

    @property
    def logits(self) -> Any:
        """The logits of a late token."""

    @property
    def can_be_late(self) -> bool:
        """Whether `sample` may return no token yet; such a sequence cannot be drafted for."""

    @property
    def top_logits(self) -> int:
        """How many of the highest logits, besides those of `changed`, determine the next token; 0: all."""

    @property
    def changed(self) -> Collection[int]:
        """Tokens whose logits the chain may change individually, by bias or penalties."""

    def sample(self, draw: Draw) -> int | None: ...

    def force(self, token: int) -> None: ...

    def late(self, wait_s: float) -> int | None: ...

    def close(self) -> None: ...


@dataclass(eq=False, slots=True)
class Sequence:
    """`tokens` are the prompt and all sampled tokens; the first `computed` of them are in the KV cells of `slot`.

    It may grow to `limit` tokens, which also depends on the slot's size. `draft` holds proposed tokens, computed with
    the last token and accepted if sampling yields the same; `drafter` tracks their acceptance. `state` holds the KV
    cells while it is preempted. `borders` are the lengths at which other prompts are likely to diverge.
    Sequences are ordered by `turn`.
    """

    request: Generate
    tokens: list[int]
    sampler: Sampler
    text: TextStream
    preserved: frozenset[int] = frozenset()  # control tokens to emit as text
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
        """Sort key: by arrival, but preemptible requests after all others."""
        return self.request.preemptible, self.arrival

    @property
    def id(self) -> int:
        return self.request.id

    @property
    def pending(self) -> int:
        """Tokens not yet computed: 1 while decoding, 0 while the next token is late."""
        return len(self.tokens) - self.computed

    @property
    def decoding(self) -> bool:
        return 0 < self.computed == len(self.tokens) - 1

    @property
    def to_border(self) -> int:
        """Pending tokens up to the next border, or all of them."""
        return next((border - self.computed for border in self.borders if border > self.computed), self.pending)

    def space_borders(self, apart: int) -> None:
        """Remove borders that follow the computed tokens, or another border, by less than `apart` tokens."""
        last, spaced = self.computed, []
        for border in self.borders:
            if border - last >= apart:
                spaced.append(border)
                last = border
        self.borders = spaced

    def begin(self, cached: int) -> None:
        """Record that it got its first slot, with `cached` tokens of its prompt already computed."""
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
"""A token; None: the token is late; or the error that prevented one."""

Share: TypeAlias = tuple[Sequence, int]
"""A sequence's part of a batch: how many pending tokens to compute, or its last token and its draft."""

Row: TypeAlias = tuple[Sequence, int]
"""A sequence, and the row of the last batch whose logits give its next token."""
