"""What one HTTP request used and how long it took, measured from the events that pass."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from llamaherd_server.engine.base import Event
from llamaherd_server.serving.metrics import Metrics
from llamaherd_server.wire.protocol import Delta, Started


@dataclass(slots=True)
class Usage:
    """Tokens of all generations of a request (a prompt counts once, however many completions it has).

    Times are seconds since the request arrived; NaN: not yet. Of several generations `entered_s` (into the queue),
    `queued_s` (how long it was there) and `ttft_s` are the first one's, `ended_s` the last one's. `decode_s` is the
    engine's figure, where tokens are not seen as they come. `outcomes`: each generation's finish reason, an error's
    code, or `cancelled`. `prefixes` are of the first prompt, of `prompt_chars` characters, where the log asks for them.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    queued_s: float = math.nan
    ttft_s: float = math.nan
    entered_s: float = math.nan
    ended_s: float = math.nan
    decode_s: float = math.nan
    outcomes: list[str] = field(default_factory=list)
    prompt_chars: int = 0
    prefixes: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """What a key's limit counts."""
        return self.prompt_tokens + self.completion_tokens


class Meter:
    """Observes one generation of a request into its `usage` and the server's metrics."""

    def __init__(
        self, metrics: Metrics, usage: Usage, *, by: tuple[str, str], arrived: float, counts_prompt: bool
    ) -> None:
        self._metrics = metrics
        self._usage = usage
        self._by = by
        self._arrived = arrived
        self._queued = time.perf_counter()
        if math.isnan(usage.entered_s):
            usage.entered_s = self._queued - arrived
        self._index = len(usage.outcomes)
        usage.outcomes.append("cancelled")
        self._counts_prompt = counts_prompt
        self._inter_token = metrics.inter_token.labels(*by)
        self._last = math.nan
        self._tokens = 0
        self.computed = 0  # tokens that the engine worked for: prompt without cached ones, and completion

    def admitted(self) -> None:
        """The generation left the queue."""
        waited = time.perf_counter() - self._queued
        self._metrics.queue_wait.labels(*self._by).observe(waited)
        if math.isnan(self._usage.queued_s):
            self._usage.queued_s = waited

    def see(self, event: Event) -> None:
        """Count an event at the moment it came."""
        now = self._since_arrival()
        if isinstance(event, Delta):
            self._token(event.n_tokens, now)
        elif isinstance(event, Started):
            self.computed += event.prompt_tokens - event.cached_tokens
            if self._counts_prompt:
                self._usage.prompt_tokens += event.prompt_tokens
                self._usage.cached_tokens += event.cached_tokens
        else:
            self._usage.completion_tokens += event.completion_tokens - self._tokens
            self._tokens = 0  # what is passed on as it is may be several generations
            if math.isnan(self._usage.ttft_s):
                self._usage.decode_s = event.decode_s
            self._metrics.finished(self._by, event, now)

    def ended(self, outcome: str) -> None:
        """The generation is over: its finish reason, an error's code, or `cancelled`."""
        self._metrics.generations.labels(*self._by, outcome).inc()
        self._usage.outcomes[self._index] = outcome
        self._usage.ended_s = self._since_arrival()

    def _token(self, n_tokens: int, now: float) -> None:
        self._tokens += n_tokens
        self.computed += n_tokens
        self._usage.completion_tokens += n_tokens
        self._metrics.totals.streamed += n_tokens
        if not math.isnan(self._last):
            self._inter_token.observe(now - self._last)
        else:
            self._metrics.ttft.labels(*self._by).observe(now)
            if math.isnan(self._usage.ttft_s):
                self._usage.ttft_s = now
        self._last = now

    def _since_arrival(self) -> float:
        return time.perf_counter() - self._arrived
