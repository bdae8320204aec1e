"""How a message is written in Anthropic's API, as one object or as events."""

from __future__ import annotations

import uuid
from typing import Any

from llamaherd_server.api.answer import Choice
from llamaherd_server.api.blocks import Block, Blocks, blocks_of
from llamaherd_server.api.chat_fields import arguments_object
from llamaherd_server.api.wire import encode, event
from llamaherd_server.engine.base import Event
from llamaherd_server.errors import ApiError
from llamaherd_server.serving.meter import Usage
from llamaherd_server.toolcalls.reader import Reader
from llamaherd_server.toolcalls.reply import Piece
from llamaherd_server.wire.protocol import Delta, Finished, Started

_DELTAS = {
    "text": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "call": ("input_json_delta", "partial_json"),
}


class MessagesShape:
    """Anthropic's message, and its events."""

    def __init__(self, model: str, reader: Reader) -> None:
        self._head = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": model}
        self._reader = reader
        self._parser = reader.parser()
        self._blocks = Blocks()

    def chunk(self, index: int, happened: Event) -> bytes:
        """The events that tell what came."""
        del index
        if isinstance(happened, Started):
            usage = _usage(happened.prompt_tokens, happened.cached_tokens, 0)
            message: dict[str, Any] = {
                **self._head,
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
                "usage": usage,
            }
            return event("message_start", message=message)
        if isinstance(happened, Delta):
            return self._told(self._parser.feed(happened.text))
        rest = self._told(self._parser.finish())
        rest += b"".join(self._closed(block) for _, block, _ in self._blocks.close())
        usage = _usage(happened.prompt_tokens, happened.cached_tokens, happened.completion_tokens)
        return rest + event("message_delta", delta=_stop(happened, self._parser.calls), usage=usage)

    def _told(self, pieces: list[Piece]) -> bytes:
        events = b""
        for what, block, text in self._blocks.add(pieces):
            if what == "open":
                empty = _content(Block(block.index, block.kind, block.id, block.name))
                events += event("content_block_start", index=block.index, content_block=empty)
            elif what == "close":
                events += self._closed(block)
            elif block.kind != "call":
                events += self._delta(block, text)
        return events

    def _closed(self, block: Block) -> bytes:
        """The end of a block; all of a call's input comes with it, as Anthropic's library fails on invalid JSON."""
        given = self._delta(block, encode(arguments_object(block.text)).decode()) if block.kind == "call" else b""
        return given + event("content_block_stop", index=block.index)

    def _delta(self, block: Block, text: str) -> bytes:
        kind, name = _DELTAS[block.kind]
        return event("content_block_delta", index=block.index, delta={"type": kind, name: text})

    def end(self, usage: Usage) -> bytes:
        """The event after which nothing comes."""
        del usage
        return event("message_stop")

    def error(self, error: ApiError) -> bytes:
        """The event that ends a stream which cannot go on."""
        return event("error", error=error.messages_body()["error"])

    def whole(self, choices: list[Choice], usage: Usage) -> dict[str, Any]:
        """The message in one object."""
        [choice] = choices
        blocks = blocks_of(choice.deltas, parser := self._reader.parser()).done
        return {
            **self._head,
            "content": [_content(block) for block in blocks],
            **_stop(choice.end, parser.calls),
            "usage": _usage(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens),
        }


def _content(block: Block) -> dict[str, Any]:
    if block.kind == "call":
        return {"type": "tool_use", "id": block.id, "name": block.name, "input": arguments_object(block.text)}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    return {"type": "text", "text": block.text, "citations": None}


def _stop(end: Finished, calls: int) -> dict[str, Any]:
    reason = "max_tokens" if end.reason == "length" else "stop_sequence" if end.stop else "end_turn"
    return {"stop_reason": "tool_use" if calls and end.reason == "stop" else reason, "stop_sequence": end.stop}


def _usage(prompt: int, cached: int, output: int) -> dict[str, Any]:
    """Anthropic counts what came from the cache apart."""
    return {
        "input_tokens": prompt - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": output,
    }
