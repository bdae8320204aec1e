"""The parts that OpenAI's answers share: envelopes, usage, timings."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from llamaherd_server.api.answer import Choice
from llamaherd_server.api.fields import GenerationFields
from llamaherd_server.api.llama_answer import native_answer, timings_object
from llamaherd_server.api.state import AppState
from llamaherd_server.errors import ApiError
from llamaherd_server.serving.meter import Usage
from llamaherd_server.wire.protocol import Finished, Generate

_DONE = b"data: [DONE]\n\n"
# Line ends that JSON may hold as they are, and at which clients in Python (httpx's iter_lines) would cut an event.
_LINE_ENDS = [(char.encode(), f"\\u{ord(char):04x}".encode()) for char in "\x85\u2028\u2029"]


def encode(value: Any) -> bytes:
    """`value` as JSON on one line, for a stream's event."""
    text = msgspec.json.encode(value)
    for raw, escaped in _LINE_ENDS:
        text = text.replace(raw, escaped)
    return text


@dataclass(frozen=True, slots=True)
class Options:
    """What a request asked to be told besides its text."""

    model: str
    fingerprint: str
    include_usage: bool = False
    # Of a choice: its index, its end and its text; what it gives is put into the answer, as llama-server does.
    verbose: Callable[[int, Finished, str], dict[str, Any]] | None = None

    @classmethod
    def of(cls, body: GenerationFields, state: AppState, requests: list[Generate]) -> Options:
        include_usage = body.stream_options is not None and body.stream_options.include_usage

        def verbose(index: int, end: Finished, text: str) -> dict[str, Any]:
            shown = {"stream": body.stream, "timings_per_token": body.timings_per_token}
            return native_answer(requests[index], state.model_name, index, end, text, **shown)

        return cls(state.model_name, state.fingerprint, include_usage, verbose if body.verbose else None)


class Envelope:
    """An answer's id and what stands around each of its chunks, encoded once: a token then costs one small encode."""

    def __init__(self, prefix: str, kind: str, options: Options) -> None:
        self.head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": options.model,
            "system_fingerprint": options.fingerprint,
        }
        self._open = b"data: " + encode(self.head)[:-1]
        self._verbose = options.verbose
        self._include_usage = options.include_usage
        self._timings = b"null"
        # OpenAI: all chunks but the last have a null usage when usage was asked for
        self._close = b',"usage":null}\n\n' if options.include_usage else b"}\n\n"

    def choice(self, index: int, body: bytes) -> bytes:
        """An event with one choice; `body`: its fields besides the index, encoded, without braces."""
        return b'%b,"choices":[{"index":%d,%b}]%b' % (self._open, index, body, self._close)

    def finish(self, index: int, body: bytes, end: Finished) -> bytes:
        """The event that ends a choice; its timings stand in the stream's last event, as llama-server has it."""
        self._timings = encode(timings_object(end))
        event = self.choice(index, body)
        if self._verbose:
            more = b',"__verbose":' + encode(self._verbose(index, end, ""))
            event = event.removesuffix(b"}\n\n") + more + b"}\n\n"
        return event if self._include_usage else event.removesuffix(b"}\n\n") + self._timed()

    def whole(self, choices: list[Choice], usage: Usage) -> dict[str, Any]:
        """What an answer in one object has after its choices."""
        first = choices[0]
        more = {"__verbose": self._verbose(0, first.end, first.text)} if self._verbose else {}
        return {"usage": usage_object(usage), "timings": timings_object(first.end), **more}

    def _timed(self) -> bytes:
        return b',"timings":' + self._timings + b"}\n\n"

    def end(self, usage: Usage) -> bytes:
        """The end of the stream; before it, where it was asked for, the event without choices that tells the usage."""
        if not self._include_usage:
            return _DONE
        return self._open + b',"choices":[],"usage":' + encode(usage_object(usage)) + self._timed() + _DONE

    def error(self, error: ApiError) -> bytes:
        """The event that ends a stream which cannot go on."""
        return b"data: " + encode(error.body()) + b"\n\n"


def event(kind: str, **fields: Any) -> bytes:
    """A named server-sent event, which says its name in its data too."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode({"type": kind, **fields}))


def usage_object(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
