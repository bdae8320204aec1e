"""The pieces of a model's output (text, reasoning, tool calls), and the parser that emits them as they arrive."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TypeAlias

from llamaherd_server.toolcalls.surrogates import SurrogateFilter
from llamaherd_server.wire.text import overlap


@dataclass(frozen=True, slots=True)
class Content:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of the model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """The start of tool call `index`, counted from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments of call `index`. Together they form one JSON object."""

    index: int
    text: str


Piece: TypeAlias = Content | Reasoning | CallBegin | CallArguments
# A generator that yields when it needs more text, and returns its result.
Reading: TypeAlias = Generator[None, None, bool]


@dataclass(slots=True)
class Call:
    """A complete tool call."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Message:
    """A complete reply."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        if isinstance(piece, Content):
            self.content += piece.text
        elif isinstance(piece, Reasoning):
            self.reasoning += piece.text
        elif isinstance(piece, CallBegin):
            self.calls.append(Call(piece.id, piece.name))
        else:
            self.calls[piece.index].arguments += piece.text


class Writer:
    """Collects pieces. Drops the white space around reasoning and calls, which comes from the template."""

    def __init__(self, *, most_calls: int | None, id_length: int | None) -> None:
        self.pieces: list[Piece] = []
        self.calls = 0
        self._most_calls = most_calls
        self._id_length = id_length
        self._spaces = ""
        self._begun = False
        self._surrogates = SurrogateFilter()

    def content(self, text: str) -> None:
        body = text if self._begun else text.lstrip()
        stripped = body.rstrip()
        if not stripped:
            self._spaces += body
            return
        self.pieces.append(Content(self._spaces + stripped))
        self._spaces = body[len(stripped) :]
        self._begun = True

    def reasoning(self, text: str) -> None:
        self.pieces.append(Reasoning(text))

    def edge(self) -> None:
        """Mark the start or end of reasoning or a call."""
        self._spaces, self._begun = "", False

    def end(self) -> None:
        self._end_call()
        if self._spaces:
            self.pieces.append(Content(self._spaces))
            self._spaces = ""

    def begin_call(self, name: str) -> None:
        self._end_call()
        self.calls += 1
        if self._wanted():
            made = uuid.uuid4().hex
            call_id = made[: self._id_length] if self._id_length else f"call_{made[:24]}"
            self.pieces.append(CallBegin(self.calls - 1, call_id, name))

    def arguments(self, text: str) -> None:
        self._arguments(self._surrogates.feed(text))

    def _end_call(self) -> None:
        self._arguments(self._surrogates.finish())

    def _arguments(self, text: str) -> None:
        if text and self._wanted():
            self.pieces.append(CallArguments(self.calls - 1, text))

    def _wanted(self) -> bool:
        return self._most_calls is None or self.calls <= self._most_calls


class Malformed(Exception):
    """The text does not follow its format. The source's `taken` has the text consumed so far."""


class Source:
    """The output received so far, for generators that read it."""

    def __init__(self) -> None:
        self.rest = ""
        self.ended = False
        self.taken = ""  # since the last `mark`

    def mark(self) -> None:
        self.taken = ""

    def _take(self, count: int) -> str:
        text, self.rest = self.rest[:count], self.rest[count:]
        self.taken += text
        return text

    def until(self, markers: tuple[str, ...], emit: Callable[[str], None]) -> Generator[None, None, str | None]:
        """Emit the text before the first of `markers`; consume and return the marker. None: the text ended first."""
        while True:
            found = [(at, -len(marker), marker) for marker in markers if (at := self.rest.find(marker)) >= 0]
            if found:
                at, _, marker = min(found)
                if at:
                    emit(self._take(at))
                if not self.ended and any(one != self.rest and one.startswith(self.rest) for one in markers):
                    yield  # a longer marker may follow
                    continue
                self._take(len(marker))
                return marker
            keep = 0 if self.ended else max((overlap(self.rest, marker) for marker in markers), default=0)
            if text := self._take(len(self.rest) - keep):
                emit(text)
            if self.ended:
                return None
            yield

    def spaces(self) -> Generator[None, None, None]:
        """Consume white space."""
        while True:
            self._take(len(self.rest) - len(self.rest.lstrip()))
            if self.rest or self.ended:
                return
            yield

    def literal(self, text: str) -> Reading:
        """Consume `text` if it comes next. Returns whether it did."""
        while len(self.rest) < len(text) and text.startswith(self.rest) and not self.ended:
            yield
        if not self.rest.startswith(text):
            return False
        self._take(len(text))
        return True

    def expect(self, text: str) -> Generator[None, None, None]:
        """Consume white space and `text`. Raises Malformed if something else comes next."""
        yield from self.spaces()
        if not (yield from self.literal(text)):
            raise Malformed

    def json(self, emit: Callable[[str], None]) -> Generator[None, None, None]:
        """Emit one JSON value as it arrives, up to its end. Raises Malformed, also if the text ends within it."""
        yield from self.spaces()
        value = _JsonValue()
        while True:
            end = next((at for at, char in enumerate(self.rest) if value.ends_before(char)), None)
            if value.malformed:
                raise Malformed
            if text := self._take(len(self.rest) if end is None else end):
                emit(text)
            if end is not None:
                return
            if self.ended:
                if value.closed:
                    return
                raise Malformed
            yield


class _JsonValue:
    """Finds the end of a JSON value, character by character."""

    def __init__(self) -> None:
        self.closed = False
        self.malformed = False
        self._depth = 0
        self._quoted = self._escaped = self._bare = False

    def ends_before(self, char: str) -> bool:
        """Return whether the value has ended, so that `char` is not part of it."""
        if self.closed:
            return True
        if self._quoted:
            self._inside_quotes(char)
        elif char == '"':
            self._quoted = True
        elif char in "{[":
            self._depth += 1
        elif self._depth:
            self._depth -= char in "}]"
            self.closed = not self._depth
        elif char in ",}]" or char.isspace():
            self.malformed = not self._bare
            return True
        else:
            self._bare = True  # a number, true, false or null
        return False

    def _inside_quotes(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._quoted = False
            self.closed = not self._depth


class Parser:
    """Turns text into pieces. `parse` reads a source and writes to a writer."""

    def __init__(self, parse: Callable[[Source, Writer], Generator[None, None, None]], writer: Writer) -> None:
        self._source = Source()
        self._writer = writer
        self._run = parse(self._source, writer)
        next(self._run, None)

    @property
    def calls(self) -> int:
        """The number of tool calls that have begun."""
        return self._writer.calls

    def feed(self, text: str) -> list[Piece]:
        """Add text and return the pieces that are now certain."""
        self._source.rest += text
        next(self._run, None)
        return self._drained()

    def finish(self) -> list[Piece]:
        """Return the pieces held back, after the last text."""
        self._source.ended = True
        for _ in self._run:
            pass
        self._writer.end()
        return self._drained()

    def _drained(self) -> list[Piece]:
        pieces, self._writer.pieces = self._writer.pieces, []
        return pieces
