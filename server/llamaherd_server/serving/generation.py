"""The generations of one HTTP request: queued, run, measured and, whatever happens, released."""

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

# For the cost that the queue expects of a request: what it is taken to generate unless its max_tokens is less, and the
# characters taken to make one token. What it really used is put right at its end.
EXPECTED_OUTPUT = 256
CHARS_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Serving:
    """What a generation needs of the server."""

    engine: Switch
    admission: Admission
    embeddings: Admission  # to the context for embeddings
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
        """The way in: places in the queue `to` the engine, one a cost, of `slots` each, within the key's limits.

        `tokens` of the key's are taken; at the end what `usage` has stands in their place. Raises ApiError.
        """
        queue, tickets = to or self.admission, list[Ticket]()
        check_budget(self.ledger, key, tokens, self.quotas.part(key))
        self.quotas.reserve(key, tokens)
        with self.ledger.account(key.name, self.model, usage, tokens):
            try:
                yield (tickets := queue.enter(key, costs, slots))
            finally:
                for ticket in tickets:  # of a task that was cancelled before it began
                    queue.leave(ticket, 0)
                self.quotas.settle(key, tokens, usage.tokens)

    @asynccontextmanager
    async def place(self, ticket: Ticket, used: Callable[[], int]) -> AsyncIterator[None]:
        """As Admission.place, once a model on demand is loaded; raises EngineError too where it cannot be."""
        async with self.engine.held(), self.admission.place(ticket, used):
            yield


@dataclass(frozen=True, slots=True)
class Text:
    """What one generation was asked and answered, for the log of an operator who wants it."""

    prompt: str | list[int]
    output: list[str] = field(default_factory=list)


class Run:
    """Runs `requests` at once and yields their events as (index, event) in the order they come.

    The `n` completions of a prompt lie side by side in `requests`. An async context manager: leaving it cancels what
    still runs. A generation that fails ends the iteration with an error. `first` waits until the first one has a slot,
    so that what fails before that can still be told by the HTTP status.
    """

    def __init__(self, serving: Serving, key: Key, requests: list[Generate], *, n: int, arrived: float) -> None:
        """`arrived`: the perf_counter reading when the HTTP request came."""
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
        self._crashed = False  # whether the engine may have ended at one of the requests

    async def __aenter__(self) -> Self:
        """Take the places in the queue; raises ApiError when a limit stands against it."""
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
        """What the generations may use: their prompts, and each one's max_tokens."""
        if not self._key.counts_tokens:
            return 0
        engine = self._serving.engine
        longest = engine.status().settings.ctx_per_slot
        outputs = sum(min(request.max_tokens or EXPECTED_OUTPUT, longest) for request in self._requests)
        return outputs + await prompt_tokens(engine, [request.prompt for request in self._requests[:: self._n]])

    async def first(self) -> None:
        """Wait for the first token; raises what came instead of it."""
        event: Event | None = None
        while event is None or isinstance(event, Started):
            index, event = await self._event()
            self._peeked.append((index, event))

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """All events from the first on, until every generation has finished or one has failed."""
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
        """One generation, from its place in the queue to its last event."""
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
            # One that has had tokens is hardly what the engine died of, and a switch of engines is nobody's doing.
            self._crashed |= type(error) is EngineError and error.code == "engine_crashed" and not begun
            told = (
                late_error(serving.limits, whole=whole.expired()) if isinstance(error, TimeoutError) else _told(error)
            )
            outcome = (told.code if isinstance(told, ApiError) else None) or "internal"
            self._events.put_nowait((index, told))
        finally:
            meter.ended(outcome)


async def prompt_tokens(engine: Switch, prompts: Iterable[str | list[int]]) -> int:
    """How many tokens the prompts have, texts counted as one."""
    prompts = list(prompts)
    text = "\n".join(prompt for prompt in prompts if isinstance(prompt, str))
    counted = 0
    if text:  # to wait for a model on demand is not this one's part
        away = engine.status().state == "unloaded"
        counted = len(text) // CHARS_PER_TOKEN if away else await engine.count_tokens(text)
    return counted + sum(len(prompt) for prompt in prompts if not isinstance(prompt, str))


def _cost(request: Generate) -> float:
    scale = CHARS_PER_TOKEN if isinstance(request.prompt, str) else 1
    return len(request.prompt) / scale + min(request.max_tokens or EXPECTED_OUTPUT, EXPECTED_OUTPUT)


def _told(error: Exception) -> Exception:
    """The error as the client is told of it; a bug stays what it is."""
    return ApiError.of_engine(error) if isinstance(error, EngineError) else error


def late_error(limits: LimitSettings, *, whole: bool) -> ApiError:
    """For the end of a request's time, as a `whole` or until its first token."""
    if whole:
        code, message = "request_timeout", f"the request took longer than {limits.request_timeout_s:g} s"
    else:
        code, message = "first_token_timeout", f"no token came within {limits.first_token_timeout_s:g} s of the start"
    # openai's clients would send it again, to the same end
    return ApiError(504, message, code=code, headers={"X-Should-Retry": "false"})
