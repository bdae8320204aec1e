"""Raw samples of single requests, with times of one monotonic clock, stored as JSON lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
from msgspec import Struct, field

from llamaherd_loadtest.files import write_whole

OK = "ok"
CUT_OFF = "cut_off"
CLIENT = "client"


class Sample(Struct, kw_only=True):
    """One request. Times are seconds of `time.perf_counter` in the client; lengths are tokens.

    `outcome` is "ok", "cut_off" (the run ended first: a miss if the request was past a limit by then), or the kind of
    error: "http 429", "stream_error", "timeout", "connection", "truncated", "protocol", "empty", or "client" if this
    machine had no socket left. `turn` counts the requests of one conversation, which share their index.
    """

    index: int
    turn: int = 0
    scheduled: float
    sent: float = 0.0
    first: float | None = None  # arrival of the first event with text
    last: float | None = None  # arrival of the last event with text
    end: float = 0.0
    gaps: list[float] = field(default_factory=list)  # between events with text
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    hidden_tokens: int = 0  # completion tokens of reasoning that no event showed
    first_share: float = 0.0  # of all characters, the share in the first event with text
    prefill: float | None = None  # prefill time in seconds, if the server reports it
    outcome: str = OK
    detail: str = ""
    warmup: bool = False

    @property
    def events(self) -> int:
        """Number of events with text."""
        return 0 if self.first is None else len(self.gaps) + 1

    @property
    def tokens(self) -> int:
        """Output tokens by the server's count; without one (a request that was cut off), one per event."""
        return self.completion_tokens or self.events

    @property
    def ttft(self) -> float | None:
        """Time to first token, in seconds from the scheduled send."""
        return None if self.first is None else self.first - self.scheduled

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first event, in seconds: (tn - t1) / (n - n1).

        n is the number of tokens shown by events and n1 those of the first event: its share of the characters, at most
        what remains if every other event brings one token.
        """
        shown = self.tokens - self.hidden_tokens
        first = max(1.0, min(shown - self.events + 1, self.first_share * shown))
        if self.first is None or self.last is None or shown - first < 1:
            return None
        return (self.last - self.first) / (shown - first)

    @property
    def queue(self) -> float | None:
        """Seconds of the TTFT outside prefill: the wait for a slot, and the network."""
        return None if self.ttft is None or self.prefill is None else max(0.0, self.ttft - self.prefill)

    @property
    def largest_gap(self) -> float | None:
        """The longest stall within the stream, in seconds."""
        return max(self.gaps, default=None)

    @property
    def e2e(self) -> float:
        """Seconds from the scheduled send to the end of the stream."""
        return self.end - self.scheduled

    @property
    def schedule_delay(self) -> float:
        """Seconds by which the client sent later than scheduled."""
        return self.sent - self.scheduled

    def tokens_between(self, start: float, end: float) -> float:
        """Output tokens that arrived in [start, end): the events in it, times the mean tokens per event."""
        if self.first is None:
            return 0.0
        inside, at = 0, self.first
        for gap in (0.0, *self.gaps):
            at += gap
            inside += start <= at < end
        return inside * self.tokens / self.events


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Write one JSON object per line."""
    write_whole(path, b"".join(msgspec.json.encode(sample) + b"\n" for sample in samples))


def read_samples(path: Path) -> Iterator[Sample]:
    """Read a file written by `write_samples`."""
    decoder = msgspec.json.Decoder(Sample)
    with path.open("rb") as file:
        yield from (decoder.decode(line) for line in file)
