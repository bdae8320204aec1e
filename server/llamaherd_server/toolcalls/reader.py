"""Reads a reply in its model's format, complete or as a stream."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass

from llamaherd_server.toolcalls.calls import Schemas
from llamaherd_server.toolcalls.formats import HARMONY, Format
from llamaherd_server.toolcalls.marks import NAME, control_tokens
from llamaherd_server.toolcalls.reply import Malformed, Message, Parser, Source, Writer


@dataclass(frozen=True, slots=True)
class Reader:
    """How to read a reply. `form`: None if there are no tools; `thinks`: the prompt ends within reasoning.

    `skipped`, `prompted`, `resumed`: see Turn.
    """

    form: Format | None
    thinking: tuple[str, str] | None
    thinks: bool
    schemas: Mapping[str, object]
    parallel: bool = True
    skipped: tuple[str, ...] = ()
    prompted: str = ""
    resumed: str = ""

    @property
    def preserved(self) -> list[str]:
        """The control tokens that the engine must output as text."""
        marks = (*(self.form.preserved if self.form else ()), *(self.thinking or ()), *self._skipped)
        return list(dict.fromkeys(token for mark in marks for token in control_tokens(mark)))

    @property
    def around(self) -> tuple[str, str, str]:
        """The part of a marker in the prompt, the text that follows reasoning, and the rest of a text's marker."""
        said = self.skipped[0].removeprefix(self.prompted) if self.prompted and self.skipped else ""
        return self.prompted, self.resumed, said

    @property
    def _skipped(self) -> tuple[str, ...]:
        """The format's and the turn's markers; one with a tool's name is repeated for each tool."""
        texts = (*(self.form.skipped if self.form else ()), *self.skipped)
        return tuple(one.replace(NAME, name) for one in texts for name in (self.schemas if NAME in one else ("",)))

    @property
    def plain(self) -> bool:
        """Whether a reply is plain text."""
        return self.form is None and self.thinking is None and not self.skipped

    def whole(self, text: str) -> Message:
        """Parse a complete reply."""
        if self.plain:
            return Message(text)
        parser, message = self.parser(), Message()
        for piece in (*parser.feed(text), *parser.finish()):
            message.add(piece)
        return message

    def parser(self) -> Parser:
        """Return a parser for a streamed reply."""
        writer = Writer(
            most_calls=None if self.parallel else 1,
            id_length=self.form.id_length if self.form else None,
        )
        if self.form is HARMONY:
            return Parser(_harmony, writer)
        return Parser(self._read, writer)

    def _read(self, source: Source, writer: Writer) -> Generator[None, None, None]:
        begin, end = self.thinking or ("", "")
        if self.thinks:
            yield from source.until((end,), writer.reasoning)
            writer.edge()
        form = self.form
        if form and form.bare:
            yield from source.spaces()
            if source.rest.startswith("{"):
                yield from _call(source, writer, form, self.schemas, "")
        marks = tuple(filter(None, (begin, form.opens if form else "", *self._skipped)))
        if self.prompted:
            yield from self._begun(source, writer, marks)
        while (mark := (yield from source.until(marks, writer.content))) is not None:
            if mark == begin:
                writer.edge()
                yield from source.until((end,), writer.reasoning)
                writer.edge()
            elif form and mark == form.opens:
                yield from _call(source, writer, form, self.schemas, mark)

    def _begun(self, source: Source, writer: Writer, marks: tuple[str, ...]) -> Generator[None, None, None]:
        """Consume the rest of the marker that begins at the end of the prompt."""
        for mark in marks:
            rest = mark.removeprefix(self.prompted) if mark.startswith(self.prompted) else ""
            if rest and (yield from source.literal(rest)):
                return
        if self.form and self.form.opens == self.prompted:
            yield from _call(source, writer, self.form, self.schemas, "")


def _call(source: Source, writer: Writer, form: Format, schemas: Schemas, opened: str) -> Generator[None, None, None]:
    """Read one call. If it is malformed, emit its text as content, so that nothing is lost."""
    before = writer.calls
    source.mark()
    try:
        yield from form.body(source, writer, schemas)
    except Malformed:
        if writer.calls == before:
            writer.content(opened + source.taken)
        return
    writer.edge()
    if form.closes:
        yield from source.spaces()
        yield from source.literal(form.closes)


def _harmony(source: Source, writer: Writer) -> Generator[None, None, None]:
    """Read messages of `<|channel|>… to=… <|message|>…<|end|>`: analysis is reasoning, functions.* are calls."""
    ends = ("<|end|>", "<|return|>", "<|call|>", "<|start|>")
    while source.rest or not source.ended:
        head: list[str] = []
        if (yield from source.until(("<|message|>",), head.append)) is None:
            writer.content("".join(head).replace("<|channel|>", "").replace("<|start|>", ""))
            return
        header = "".join(head)
        words = header.replace("<|", " <|").split()
        tool = next((word.removeprefix("to=functions.") for word in words if word.startswith("to=functions.")), None)
        emit = writer.content
        if tool is not None:
            writer.edge()
            writer.begin_call(tool)
            emit = writer.arguments
        elif "analysis" in header.partition("<|channel|>")[2]:
            emit = writer.reasoning
        yield from source.until(ends, emit)
        writer.edge()
