"""One request inside the worker: its tokens, how far they are computed, and what of its text has been sent."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from llamaherd_server.protocol import Finished, FinishReason, Generate
from llamaherd_server.worker.sampling import Sampler
from llamaherd_server.worker.text import TextStream


@dataclass(eq=False)
class Sequence:
    """`tokens` is the prompt and all that was sampled; the first `computed` of them are in the slot's KV cells."""

    request: Generate
    tokens: list[int]
    sampler: Sampler
    text: TextStream
    limit: int  # tokens it may grow to
    n_prompt: int = 0
    slot: int = -1
    computed: int = 0
    cached: int = 0
    started: bool = False
    begun: float = field(default_factory=time.perf_counter)
    first: float = 0.0

    def __post_init__(self) -> None:
        self.n_prompt = len(self.tokens)

    @property
    def pending(self) -> int:
        """Tokens not yet computed; 1 when it is generating."""
        return len(self.tokens) - self.computed

    def finished(self, reason: FinishReason) -> Finished:
        now = time.perf_counter()
        first = self.first or now
        return Finished(
            id=self.request.id,
            reason=reason,
            prompt_tokens=self.n_prompt,
            cached_tokens=self.cached,
            completion_tokens=len(self.tokens) - self.n_prompt,
            prompt_s=first - self.begun,
            decode_s=now - first,
            stop=self.text.stop,
        )
