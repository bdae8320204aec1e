"""The events of an OpenAI-compatible chat stream: one line of server-sent events in, one typed chunk out.

Only the fields that a measurement needs are decoded; all others are skipped by the decoder.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct, field


class PromptDetails(Struct, gc=False):
    cached_tokens: int | None = None


class Usage(Struct, gc=False):
    """Token counts as the server's own tokenizer gives them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None


class Timings(Struct, gc=False):
    """llama-server's account of one request, in its last chunk."""

    prompt_ms: float | None = None


class Delta(Struct, gc=False):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[msgspec.Raw] | None = None


class Choice(Struct, gc=False):
    delta: Delta = field(default_factory=Delta)
    finish_reason: str | None = None


class ErrorBody(Struct, gc=False):
    message: str = ""
    type: str | None = None
    code: str | int | None = None


class Chunk(Struct, gc=False):
    """One `data:` event. A role-only delta carries no text and does not count as a first token."""

    choices: list[Choice] = field(default_factory=list)
    usage: Usage | None = None
    timings: Timings | None = None
    error: ErrorBody | str | None = None

    @property
    def has_text(self) -> bool:
        """Whether the event brings output: a non-empty delta of content, reasoning or a tool call."""
        for choice in self.choices:  # looked at for each event: any() over a generator costs twice as much
            delta = choice.delta
            if delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls:
                return True
        return False

    @property
    def finished(self) -> bool:
        """Whether a choice says why it ended."""
        return any(choice.finish_reason for choice in self.choices)

    @property
    def text(self) -> str:
        """The content that the event brings."""
        return "".join([choice.delta.content or "" for choice in self.choices])

    @property
    def error_message(self) -> str:
        """The text of an error event; empty where there is none."""
        return self.error.message if isinstance(self.error, ErrorBody) else self.error or ""


END = Chunk()
"""What `parse_line` gives for `data: [DONE]`; compare by identity."""

_chunks = msgspec.json.Decoder(Chunk)
_errors = msgspec.json.Decoder(ErrorBody)


def parse_line(line: bytes | bytearray) -> Chunk | None:
    """Decode one line of the stream; None for comments, event names and the blank lines between events.

    Raises `msgspec.DecodeError` where the payload is not the JSON of a chunk.
    """
    if line.startswith(b"data:"):
        payload = line[5:]
        return END if len(payload) < 10 and payload.strip() == b"[DONE]" else _chunks.decode(payload)
    if line.startswith(b"error:"):  # llama-server's own form of an in-stream error
        return Chunk(error=_errors.decode(line[6:].strip()))
    return None
