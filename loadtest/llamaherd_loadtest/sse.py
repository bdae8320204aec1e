"""The events of an OpenAI-compatible chat stream: parses a line of server-sent events into a typed chunk.

Only the fields that a measurement needs are decoded; the decoder skips all others.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct


class PromptDetails(Struct, gc=False):
    cached_tokens: int | None = None


class CompletionDetails(Struct, gc=False):
    reasoning_tokens: int | None = None


class Usage(Struct, gc=False):
    """Token counts by the server's own tokenizer."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: CompletionDetails | None = None


class Timings(Struct, gc=False):
    """llama-server's timings of one request, in its last chunk."""

    prompt_ms: float | None = None


class Part(Struct, gc=False):
    """One part of a list-valued content."""

    text: str | None = None


class Delta(Struct, gc=False):
    content: str | list[Part] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[msgspec.Raw] | None = None


class Choice(Struct, gc=False):
    delta: Delta | None = None
    text: str | None = None  # in legacy completions, which have no delta
    finish_reason: str | None = None


class ErrorBody(Struct, gc=False):
    message: str | None = None
    type: str | None = None
    code: str | int | None = None


class Chunk(Struct, gc=False):
    """One `data:` event. A role-only delta carries no text and does not count as a first token."""

    choices: list[Choice] | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    error: ErrorBody | str | None = None
    object: str | None = None
    message: str | None = None

    @property
    def size(self) -> int:
        """The event's output in characters of content, reasoning and tool calls."""
        size = 0
        for choice in self.choices or ():  # runs for every event: sum() over a generator costs twice as much
            delta = choice.delta
            if delta is not None:
                content = delta.content if isinstance(delta.content, str) else _joined(delta.content)
                size += len(content) + len(delta.reasoning_content or delta.reasoning or "")
                if delta.tool_calls:
                    size += sum(len(bytes(call)) for call in delta.tool_calls)
        return size

    @property
    def reasons(self) -> bool:
        """Whether the event shows reasoning."""
        return any(c.delta is not None and (c.delta.reasoning_content or c.delta.reasoning) for c in self.choices or ())

    @property
    def finish_reason(self) -> str:
        """Why the answer ended; empty while it continues."""
        return next((choice.finish_reason for choice in self.choices or () if choice.finish_reason), "")

    @property
    def text(self) -> str:
        """The event's content."""
        contents = (choice.delta.content if choice.delta else choice.text for choice in self.choices or ())
        return "".join(content if isinstance(content, str) else _joined(content) for content in contents)

    @property
    def error_message(self) -> str:
        """The text of an error event, also in vLLM's older form (object "error"); empty if the event is not one."""
        if self.object == "error":
            return self.message or "error without a message"
        return (self.error.message if isinstance(self.error, ErrorBody) else self.error) or ""

    @property
    def is_error(self) -> bool:
        """Whether the event reports an error."""
        return self.error is not None or self.object == "error"


def _joined(parts: list[Part] | None) -> str:
    return "".join(part.text or "" for part in parts or ())


END = Chunk()
"""The result of `parse_line` for `data: [DONE]`; compare by identity."""

_chunks = msgspec.json.Decoder(Chunk)
_errors = msgspec.json.Decoder(ErrorBody)


def parse_line(line: bytes | bytearray) -> Chunk | None:
    """Decode one line of the stream; None for comments, event names and the blank lines between events.

    Raises `msgspec.DecodeError` if the payload is not the JSON of a chunk.
    """
    if line.startswith(b"data:"):
        payload = line[5:]
        return END if len(payload) < 10 and payload.strip() == b"[DONE]" else _chunks.decode(payload)
    if line.startswith(b"error:"):  # llama-server's own form of an in-stream error
        return Chunk(error=_errors.decode(line[6:].strip()))
    return None
