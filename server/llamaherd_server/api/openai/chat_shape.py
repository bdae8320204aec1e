"""How a chat completion is written, as one object or as chunks."""

from __future__ import annotations

from typing import Any

from llamaherd_server.api.answer import Choice
from llamaherd_server.api.wire import Envelope, Options, encode
from llamaherd_server.engine.base import Event
from llamaherd_server.serving.meter import Usage
from llamaherd_server.toolcalls.reader import Reader
from llamaherd_server.toolcalls.reply import CallBegin, Content, Message, Parser, Piece, Reasoning
from llamaherd_server.wire.protocol import Delta, Finished, Logprob, Started, TokenLogprob


class ChatShape:
    """OpenAI's chat.completion and chat.completion.chunk."""

    def __init__(self, options: Options, reader: Reader, *, logprobs: bool) -> None:
        self._reader = reader
        self._logprobs = logprobs
        self._envelope = envelope = Envelope("chatcmpl", "chat.completion.chunk", options)
        self.end, self.error = envelope.end, envelope.error
        self._parsers: dict[int, Parser] = {}

    def chunk(self, index: int, event: Event) -> bytes:
        """The events that tell what came of choice `index`."""
        if isinstance(event, Started):
            if not self._reader.plain:
                self._parsers[index] = self._reader.parser()
            return self._delta(index, {"role": "assistant", "content": ""})
        parser = self._parsers.get(index)
        if isinstance(event, Delta):
            if parser is None:
                if not event.text and not event.logprobs:
                    return b""
                return self._delta(index, {"content": event.text}, event.logprobs)
            deltas = [piece_delta(piece) for piece in parser.feed(event.text)]
            if event.logprobs and not deltas:
                deltas = [{}]
            told = [event.logprobs, *[None] * len(deltas)]  # with the first piece of the text that they belong to
            return b"".join(self._delta(index, delta, told[at]) for at, delta in enumerate(deltas))
        rest = b"".join(self._delta(index, piece_delta(piece)) for piece in parser.finish()) if parser else b""
        body = b'"delta":{},"logprobs":null,"finish_reason":' + encode(
            finish_reason(event, parser.calls if parser else 0)
        )
        return rest + self._envelope.finish(index, body, event)

    def _delta(self, index: int, delta: dict[str, Any], logprobs: list[TokenLogprob] | None = None) -> bytes:
        told = encode(_logprobs(logprobs)) if logprobs else b"null"
        return self._envelope.choice(index, b'"delta":%b,"logprobs":%b,"finish_reason":null' % (encode(delta), told))

    def whole(self, choices: list[Choice], usage: Usage) -> dict[str, Any]:
        """The answer in one object."""
        return {
            **self._envelope.head,
            "object": "chat.completion",
            "choices": [self._choice(choice) for choice in choices],
            **self._envelope.whole(choices, usage),
        }

    def _choice(self, choice: Choice) -> dict[str, Any]:
        message = self._reader.whole(choice.text)
        return {
            "index": choice.index,
            "message": _message(message),
            "logprobs": _logprobs(choice.logprobs) if self._logprobs else None,
            "finish_reason": finish_reason(choice.end, len(message.calls)),
        }


def finish_reason(end: Finished, calls: int) -> str:
    """OpenAI's word for why a reply with so many calls ended."""
    return "tool_calls" if calls and end.reason == "stop" else end.reason


def piece_delta(piece: Piece) -> dict[str, Any]:
    """A piece of a reply as a chunk's delta."""
    if isinstance(piece, Content):
        return {"content": piece.text}
    if isinstance(piece, Reasoning):
        return {"reasoning_content": piece.text}
    if isinstance(piece, CallBegin):
        function = {"name": piece.name, "arguments": ""}
        return {"tool_calls": [{"index": piece.index, "id": piece.id, "type": "function", "function": function}]}
    return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}


def _message(message: Message) -> dict[str, Any]:
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in message.calls
    ]
    return {
        "role": "assistant",
        "content": None if calls and not message.content else message.content,
        "refusal": None,
        **({"reasoning_content": message.reasoning} if message.reasoning else {}),
        **({"tool_calls": calls} if calls else {}),
    }


def _logprobs(tokens: list[TokenLogprob]) -> dict[str, Any]:
    return {
        "content": [{**_logprob(token), "top_logprobs": [_logprob(other) for other in token.top]} for token in tokens],
        "refusal": None,
    }


def _logprob(token: Logprob | TokenLogprob) -> dict[str, Any]:
    return {"token": token.text.decode(errors="replace"), "logprob": token.logprob, "bytes": list(token.text)}
