"""Runs the generations of one HTTP request: queues and measures them, and releases their resources in any case."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import ExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import msgspec

from llamaherd_server.config.keys import Key
from llamaherd_server.config.settings import LimitSettings, LogSettings
from llamaherd_server.engine.base import Event
from llamaherd_server.engine.switch import Switch
from llamaherd_server.errors import ApiError
from llamaherd_server.serving.admission import Admission, Ticket
from llamaherd_server.serving.budget import check_budget
from llamaherd_server.serving.ledger import Ledger
from llamaherd_server.serving.meter import Meter, Usage
from llamaherd_server.serving.metrics import Metrics
from llamaherd_server.serving.prefixes import prefixes
from llamaherd_server.serving.quota import Quotas
from llamaherd_server.wire.errors import EngineError
from llamaherd_server.wire.protocol import Delta, Finished, Generate, Started

# A request's estimated cost in the queue: EXPECTED_OUTPUT tokens, or max_tokens if less, plus the prompt's characters
# at CHARS_PER_TOKEN. The actual usage replaces the estimate when the request ends.
EXPECTED_OUTPUT = 256
CHARS_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Serving:
    """The parts of the server that a generation of one model uses."""

    engine: Switch
    admission: Admission
    embeddings: Admission  # queue of the embedding context
    quotas: Quotas
    ledger: Ledger
    metrics: Metrics
    model: str
    limits: LimitSettings
    log: LogSettings

    @contextmanager
    def reserve(
        self, key: Key, usage: Usage, *, tokens: float, costs: list[float], slots: int = 1, to: Admission | None = None
    ) -> Iterator[list[Ticket]]:
        """Check the key's limits and queue one ticket of `slots` for each cost, in `to` or the engine's queue.

        Charges the key `tokens` at first, and at the end the tokens in `usage` instead. Raises ApiError.
        """
        queue, tickets = to or self.admission, list[Ticket]()
        check_budget(self.ledger, key, tokens, self.quotas.part(key))
        self.quotas.reserve(key, tokens)
        with self.ledger.account(key.name, self.model, usage, tokens):
            try:
                yield (tickets := queue.enter(key, costs, slots))
            finally:
                for ticket in tickets:  # a task cancelled before its start has not released its ticket
                    queue.leave(ticket, 0)
                self.quotas.settle(key, tokens, usage.tokens)

    @asynccontextmanager
    async def place(self, ticket: Ticket, used: Callable[[], int]) -> AsyncIterator[None]:
        """Load a model on demand, then wait as in Admission.place; raises EngineError if the load fails."""
        async with self.engine.held(), self.admission.place(ticket, used):
            yield


@dataclass(frozen=True, slots=True)
class Text:
    """Prompt and output of one generation, for the log if log.texts is set."""

    prompt: str | list[int]
    output: list[str] = field(default_factory=list)


class Run:
    """Runs `requests` concurrently and yields their events as (index, event) in order of arrival.

    The `n` completions of a prompt are adjacent in `requests`. An async context manager; leaving it cancels the running
    generations. If one fails, the iteration ends with its error. `first` waits for the first token, so that earlier
    errors can still set the HTTP status.
    """

    def __init__(self, serving: Serving, key: Key, requests: list[Generate], *, n: int, arrived: float) -> None:
        """`arrived`: the perf_counter reading at the arrival of the HTTP request."""
        self.usage = Usage()
        self.texts = [Text(request.prompt) for request in requests] if serving.log.texts else []
        if serving.log.prefixes:
            self.usage.prompt_chars = len(requests[0].prompt)
            self.usage.prefixes = prefixes(requests[0].prompt)
        self._arrived = arrived
        self._serving = serving
        self._key = key
        scope = key.name if serving.limits.prompt_cache_scope == "key" else ""
        mine = {"owner": key.name, "cache_scope": scope, "preemptible": key.preemptible}
        self._requests = [msgspec.structs.replace(one, **mine) for one in requests]
        self._n = n
        self._reserved = ExitStack()
        self._events: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._peeked: deque[tuple[int, Event]] = deque()
        self._crashed = False  # whether one of the requests may have crashed the engine

    async def __aenter__(self) -> Self:
        """Check the limits and queue the generations; raises ApiError if a limit is exceeded."""
        serving, key = self._serving, self._key
        tokens, costs = await self._expected_tokens(), [_cost(request) for request in self._requests]
        tickets = self._reserved.enter_context(serving.reserve(key, self.usage, tokens=tokens, costs=costs))
        for index, (request, ticket) in enumerate(zip(self._requests, tickets, strict=True)):
            meter = Meter(
                serving.metrics,
                self.usage,
                by=(key.name, serving.model),
                arrived=self._arrived,
                counts_prompt=index % self._n == 0,
            )
            self._tasks.append(asyncio.create_task(self._pump(index, request, ticket, meter)))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._crashed:
            self._serving.quotas.crashed(self._key)
        self._reserved.close()

    async def _expected_tokens(self) -> float:
        """Return the tokens to reserve: prompts, and each `max_tokens` or EXPECTED_OUTPUT; 0 without a token limit."""
        if not self._key.counts_tokens:
            return 0
        engine = self._serving.engine
        longest = engine.status().settings.ctx_per_slot
        outputs = sum(min(request.max_tokens or EXPECTED_OUTPUT, longest) for request in self._requests)
        return outputs + await prompt_tokens(engine, [request.prompt for request in self._requests[:: self._n]])

    async def first(self) -> None:
        """Wait for the first token; raises the error if a generation fails before it."""
        event: Event | None = None
        while event is None or isinstance(event, Started):
            index, event = await self._event()
            self._peeked.append((index, event))

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield all events from the start, until every generation has finished; raises the first error."""
        left = len(self._requests)
        while left:
            index, event = self._peeked.popleft() if self._peeked else await self._event()
            left -= isinstance(event, Finished)
            yield index, event

    async def _event(self) -> tuple[int, Event]:
        index, event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        return index, event

    async def _pump(self, index: int, request: Generate, ticket: Ticket, meter: Meter) -> None:
        """Run one generation, from the queue to its last event."""
        serving = self._serving
        outcome, begun = "cancelled", False
        try:
            whole = asyncio.timeout(serving.limits.request_timeout_s)
            async with whole, serving.place(ticket, lambda: meter.computed):
                meter.admitted()
                first = asyncio.timeout(serving.limits.first_token_timeout_s)
                async with aclosing(serving.engine.generate(request)) as events, first:
                    async for event in events:
                        if isinstance(event, Delta):
                            begun = True
                            first.reschedule(None)
                            if self.texts:
                                self.texts[index].output.append(event.text)
                        meter.see(event)
                        self._events.put_nowait((index, event))
                        if isinstance(event, Finished):
                            outcome = event.reason
        except Exception as error:
            # A request that has produced tokens hardly caused the crash; a switch of engines raises a subclass.
            self._crashed |= type(error) is EngineError and error.code == "engine_crashed" and not begun
            reported = _for_client(error)
            if isinstance(error, TimeoutError):
                reported = late_error(serving.limits, whole=whole.expired())
            outcome = (reported.code if isinstance(reported, ApiError) else None) or "internal"
            self._events.put_nowait((index, reported))
        finally:
            meter.ended(outcome)


async def prompt_tokens(engine: Switch, prompts: Iterable[str | list[int]]) -> int:
    """Return the number of tokens in the prompts; texts are joined and counted together."""
    prompts = list(prompts)
    text = "\n".join(prompt for prompt in prompts if isinstance(prompt, str))
    counted = 0
    if text:  # counting must not load a model on demand
        away = engine.status().state == "unloaded"
        counted = len(text) // CHARS_PER_TOKEN if away else await engine.count_tokens(text)
    return counted + sum(len(prompt) for prompt in prompts if not isinstance(prompt, str))


def _cost(request: Generate) -> float:
    scale = CHARS_PER_TOKEN if isinstance(request.prompt, str) else 1
    return len(request.prompt) / scale + min(request.max_tokens or EXPECTED_OUTPUT, EXPECTED_OUTPUT)


def _for_client(error: Exception) -> Exception:
    """Convert an EngineError to the ApiError for the client; other exceptions are bugs and stay unchanged."""
    return ApiError.of_engine(error) if isinstance(error, EngineError) else error


def late_error(limits: LimitSettings, *, whole: bool) -> ApiError:
    """Return the 504 for a request that took too long, as a `whole` or until its first token."""
    if whole:
        code, message = "request_timeout", f"the request took longer than {limits.request_timeout_s:g} s"
    else:
        code, message = "first_token_timeout", f"no token came within {limits.first_token_timeout_s:g} s of the start"
    # OpenAI's clients would otherwise retry, in vain
    return ApiError(504, message, code=code, headers={"X-Should-Retry": "false"})
