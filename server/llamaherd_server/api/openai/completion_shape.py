"""How a text completion is written, as one object or as chunks."""

from __future__ import annotations

from typing import Any

from llamaherd_server.api.answer import Choice
from llamaherd_server.api.wire import Envelope, Options, encode
from llamaherd_server.engine.base import Event
from llamaherd_server.serving.meter import Usage
from llamaherd_server.wire.protocol import Delta, Started, TokenLogprob


class CompletionShape:
    """OpenAI's text_completion. `echo`: what stands before each choice's text, empty without echo."""

    def __init__(self, options: Options, *, logprobs: bool, echo: list[str]) -> None:
        self._logprobs = logprobs
        self._echo = echo
        self._offsets = [len(text) for text in echo]
        self._envelope = envelope = Envelope("cmpl", "text_completion", options)
        self.end, self.error = envelope.end, envelope.error

    def chunk(self, index: int, event: Event) -> bytes:
        """The events that tell what came of choice `index`."""
        if isinstance(event, Started):
            return self._text(index, self._echo[index], b"null") if self._echo[index] else b""
        if isinstance(event, Delta):
            if not event.text and not event.logprobs:
                return b""
            return self._text(index, event.text, encode(self._take_logprobs(index, event.logprobs)))
        body = b'"text":"","logprobs":null,"finish_reason":' + encode(event.reason)
        return self._envelope.finish(index, body, event)

    def whole(self, choices: list[Choice], usage: Usage) -> dict[str, Any]:
        """The answer in one object."""
        return {
            **self._envelope.head,
            "choices": [self._choice(choice) for choice in choices],
            **self._envelope.whole(choices, usage),
        }

    def _text(self, index: int, text: str, logprobs: bytes) -> bytes:
        return self._envelope.choice(index, b'"text":%b,"logprobs":%b,"finish_reason":null' % (encode(text), logprobs))

    def _choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": self._echo[choice.index] + choice.text,
            "logprobs": self._take_logprobs(choice.index, choice.logprobs) if self._logprobs else None,
            "finish_reason": choice.end.reason,
        }

    def _take_logprobs(self, index: int, tokens: list[TokenLogprob] | None) -> dict[str, Any] | None:
        """The legacy form: parallel lists, each token with its offset in the choice's text."""
        if not tokens:
            return None
        texts = [token.text.decode(errors="replace") for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_top(token) for token in tokens],
            "text_offset": offsets,
        }


def _top(token: TokenLogprob) -> dict[str, float]:
    """The most likely tokens and, as OpenAI has it, the chosen one, though it were one more than was asked for."""
    most_likely = {one.text.decode(errors="replace"): one.logprob for one in token.top}
    return most_likely | {token.text.decode(errors="replace"): token.logprob}
