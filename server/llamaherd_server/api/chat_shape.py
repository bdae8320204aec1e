"""How a chat completion is written, as one object or as chunks."""

from __future__ import annotations

from typing import Any

from llamaherd_server.api.answer import Choice
from llamaherd_server.api.wire import Envelope, Options, encode, timings_object, usage_object
from llamaherd_server.engine.base import Event
from llamaherd_server.meter import Usage
from llamaherd_server.protocol import Delta, Logprob, Started, TokenLogprob


class ChatShape:
    """OpenAI's chat.completion and chat.completion.chunk."""

    def __init__(self, options: Options, *, logprobs: bool) -> None:
        self._options = options
        self._logprobs = logprobs
        self._envelope = Envelope("chatcmpl", "chat.completion.chunk", options)

    def chunk(self, index: int, event: Event) -> bytes:
        """The events that tell what came of choice `index`."""
        if isinstance(event, Delta):
            if not event.text and not event.logprobs:
                return b""
            logprobs = encode(_logprobs(event.logprobs)) if event.logprobs else b"null"
            return self._envelope.choice(
                index, b'"delta":{"content":%b},"logprobs":%b,"finish_reason":null' % (encode(event.text), logprobs)
            )
        if isinstance(event, Started):
            return self._envelope.choice(
                index, b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
            )
        timings = timings_object(event) if self._options.timings else None
        body = b'"delta":{},"logprobs":null,"finish_reason":' + encode(event.reason)
        return self._envelope.finish(index, body, timings)

    def last_chunk(self, usage: Usage) -> bytes:
        """The usage, if it was asked for."""
        return self._envelope.usage(usage) if self._options.include_usage else b""

    def whole(self, choices: list[Choice], usage: Usage) -> dict[str, Any]:
        """The answer in one object."""
        return {
            **self._envelope.head,
            "object": "chat.completion",
            "choices": [self._choice(choice) for choice in choices],
            "usage": usage_object(usage),
            **({"timings": timings_object(choices[0].end)} if self._options.timings else {}),
        }

    def _choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": _logprobs(choice.logprobs) if self._logprobs else None,
            "finish_reason": choice.end.reason,
        }


def _logprobs(tokens: list[TokenLogprob]) -> dict[str, Any]:
    return {
        "content": [{**_logprob(token), "top_logprobs": [_logprob(other) for other in token.top]} for token in tokens],
        "refusal": None,
    }


def _logprob(token: Logprob | TokenLogprob) -> dict[str, Any]:
    return {"token": token.text.decode(errors="replace"), "logprob": token.logprob, "bytes": list(token.text)}
