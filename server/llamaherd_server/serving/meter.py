"""Measures tokens and times of one HTTP request from its engine events."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from llamaherd_server.engine.base import Event
from llamaherd_server.serving.metrics import Metrics
from llamaherd_server.wire.protocol import Delta, Started


@dataclass(slots=True)
class Usage:
    """Tokens of all generations of a request. A prompt counts once, however many completions it has.

    Times are in seconds since the request arrived, NaN until known. With several generations, `entered_s` (entry into
    the queue), `queued_s` (time in the queue) and `ttft_s` are of the first, `ended_s` is of the last. `decode_s` is
    the engine's figure, set if tokens are not streamed. `outcomes`: finish reason, error code or `cancelled` of each
    generation. `prefixes` and `prompt_chars` describe the first prompt and are set only if log.prefixes is.
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
        """Tokens that count towards a key's limits."""
        return self.prompt_tokens + self.completion_tokens


class Meter:
    """Records one generation of a request in its `usage` and in the server's metrics."""

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
        self.computed = 0  # tokens that the engine computed: the prompt without cached ones, and the completion

    def admitted(self) -> None:
        """Record that the generation left the queue."""
        waited = time.perf_counter() - self._queued
        self._metrics.queue_wait.labels(*self._by).observe(waited)
        if math.isnan(self._usage.queued_s):
            self._usage.queued_s = waited

    def see(self, event: Event) -> None:
        """Record an event, now."""
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
            self._tokens = 0  # a forwarded llama-server request may contain several generations
            if math.isnan(self._usage.ttft_s):
                self._usage.decode_s = event.decode_s
            self._metrics.finished(self._by, event, now)

    def ended(self, outcome: str) -> None:
        """Record the end of the generation: its finish reason, an error code or `cancelled`."""
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
