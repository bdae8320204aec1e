"""The parts that OpenAI's response formats share: envelopes, usage, timings."""

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
# Line separators that JSON may contain unescaped, but at which Python clients (httpx's iter_lines) split an event.
_LINE_ENDS = [(char.encode(), f"\\u{ord(char):04x}".encode()) for char in "\x85\u2028\u2029"]


def encode(value: Any) -> bytes:
    """Return `value` as JSON on one line, for an event of a stream."""
    text = msgspec.json.encode(value)
    for raw, escaped in _LINE_ENDS:
        text = text.replace(raw, escaped)
    return text


@dataclass(frozen=True, slots=True)
class Options:
    """What the response contains besides the text."""

    model: str
    fingerprint: str
    include_usage: bool = False
    # Returns llama-server's object for a choice from its index, end and text; it becomes the answer's `__verbose`.
    verbose: Callable[[int, Finished, str], dict[str, Any]] | None = None

    @classmethod
    def of(cls, body: GenerationFields, state: AppState, requests: list[Generate]) -> Options:
        include_usage = body.stream_options is not None and body.stream_options.include_usage

        def verbose(index: int, end: Finished, text: str) -> dict[str, Any]:
            shown = {"stream": body.stream, "timings_per_token": body.timings_per_token}
            return native_answer(requests[index], state.model_name, index, end, text, **shown)

        return cls(state.model_name, state.fingerprint, include_usage, verbose if body.verbose else None)


class Envelope:
    """An answer's id and the JSON around each of its chunks, encoded once, so that a token costs one small encode."""

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
        """Return an event with one choice. `body`: its encoded fields except the index, without braces."""
        return b'%b,"choices":[{"index":%d,%b}]%b' % (self._open, index, body, self._close)

    def finish(self, index: int, body: bytes, end: Finished) -> bytes:
        """Return the event that ends a choice. Its timings go into the stream's last event, as in llama-server."""
        self._timings = encode(timings_object(end))
        event = self.choice(index, body)
        if self._verbose:
            more = b',"__verbose":' + encode(self._verbose(index, end, ""))
            event = event.removesuffix(b"}\n\n") + more + b"}\n\n"
        return event if self._include_usage else event.removesuffix(b"}\n\n") + self._timed()

    def whole(self, choices: list[Choice], usage: Usage) -> dict[str, Any]:
        """Return the fields that follow the choices in an answer that is not streamed."""
        first = choices[0]
        more = {"__verbose": self._verbose(0, first.end, first.text)} if self._verbose else {}
        return {"usage": usage_object(usage), "timings": timings_object(first.end), **more}

    def _timed(self) -> bytes:
        return b',"timings":' + self._timings + b"}\n\n"

    def end(self, usage: Usage) -> bytes:
        """Return the end of the stream, preceded by the event with the usage if the client asked for it."""
        if not self._include_usage:
            return _DONE
        return self._open + b',"choices":[],"usage":' + encode(usage_object(usage)) + self._timed() + _DONE

    def error(self, error: ApiError) -> bytes:
        """Return the event that ends a failed stream."""
        return error_event(error)


def error_event(error: ApiError) -> bytes:
    """Return the event that ends a failed stream."""
    return b"data: " + encode(error.body()) + b"\n\n"


def event(kind: str, **fields: Any) -> bytes:
    """Return a named server-sent event, with the name also as the `type` in its data."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode({"type": kind, **fields}))


def usage_object(usage: Usage) -> dict[str, Any]:
    """Return the usage in OpenAI's format."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
