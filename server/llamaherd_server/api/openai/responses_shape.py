"""How a response is written in OpenAI's Responses API, as one object or as typed events."""

from __future__ import annotations

import time
import uuid
from typing import Any

from llamaherd_server.api.answer import Choice
from llamaherd_server.api.blocks import Block, Blocks, blocks_of
from llamaherd_server.api.wire import event
from llamaherd_server.engine.base import Event
from llamaherd_server.errors import ApiError
from llamaherd_server.serving.meter import Usage
from llamaherd_server.toolcalls.reader import Reader
from llamaherd_server.toolcalls.reply import Piece
from llamaherd_server.wire.protocol import Delta, FinishReason, Started

_PREFIXES = {"text": "msg", "reasoning": "rs", "call": "fc"}


class ResponsesShape:
    """OpenAI's response, and its events. `told_back`: the fields of the request that a response repeats."""

    def __init__(self, model: str, reader: Reader, told_back: dict[str, Any]) -> None:
        self._head = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "error": None,
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            **told_back,
        }
        self._reader = reader
        self._parser = reader.parser()
        self._blocks = Blocks()
        self._sequence = 0
        self._reason: FinishReason = "stop"

    def chunk(self, index: int, happened: Event) -> bytes:
        """The events that tell what came."""
        del index
        if isinstance(happened, Started):
            response = self._response("in_progress", Blocks(), None)
            return self._event("response.created", response=response) + self._event(
                "response.in_progress", response=response
            )
        if isinstance(happened, Delta):
            return self._told(self._parser.feed(happened.text), happened.n_tokens)
        self._reason = happened.reason
        rest = self._told(self._parser.finish())
        return rest + b"".join(self._closed(block, self._status()) for _, block, _ in self._blocks.close())

    def _told(self, pieces: list[Piece], n_tokens: int = 0) -> bytes:
        events = b""
        for what, block, text in self._blocks.add(pieces, n_tokens):
            if what == "open":
                events += self._opened(block)
            elif what == "more":
                events += self._event(f"{_kind(block)}.delta", **self._at(block), delta=text, **_logprobs(block))
            else:
                events += self._closed(block, "completed")
        return events

    def _status(self) -> str:
        return "completed" if self._reason == "stop" else "incomplete"

    def _opened(self, block: Block) -> bytes:
        item = self._item(Block(block.index, block.kind, block.id, block.name), "in_progress")
        events = self._event("response.output_item.added", output_index=block.index, item=item)
        if block.kind == "call":
            return events
        return events + self._event("response.content_part.added", **self._at(block), part=_part(block.kind, ""))

    def _closed(self, block: Block, status: str) -> bytes:
        if block.kind == "call":
            done = self._event(f"{_kind(block)}.done", **self._at(block), name=block.name, arguments=block.text)
        else:
            done = self._event(f"{_kind(block)}.done", **self._at(block), text=block.text, **_logprobs(block))
            part = _part(block.kind, block.text)
            done += self._event("response.content_part.done", **self._at(block), part=part)
        item = self._item(block, status)
        return done + self._event("response.output_item.done", output_index=block.index, item=item)

    def end(self, usage: Usage) -> bytes:
        """The event with the whole response."""
        status = self._status()
        return self._event(f"response.{status}", response=self._response(status, self._blocks, usage))

    def error(self, error: ApiError) -> bytes:
        """The event that ends a stream which cannot go on."""
        body = error.body()["error"]
        return self._event("error", code=body["code"], message=body["message"], param=body["param"])

    def whole(self, choices: list[Choice], usage: Usage) -> dict[str, Any]:
        """The response in one object."""
        [choice] = choices
        self._reason = choice.end.reason
        return self._response(self._status(), blocks_of(choice.deltas, self._reader.parser()), usage)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._sequence += 1
        return event(kind, sequence_number=self._sequence - 1, **fields)

    def _response(self, status: str, blocks: Blocks, usage: Usage | None) -> dict[str, Any]:
        return {
            **self._head,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            # what the limit cut off is the last item
            "output": [self._item(block, "completed") for block in blocks.done[:-1]]
            + [self._item(block, status) for block in blocks.done[-1:]],
            "usage": None if usage is None else _usage(usage, blocks.reasoning_tokens),
        }

    def _item_id(self, block: Block) -> str:
        return f"{_PREFIXES[block.kind]}_{self._head['id'][5:]}_{block.index}"

    def _at(self, block: Block) -> dict[str, Any]:
        place = {"item_id": self._item_id(block), "output_index": block.index}
        return place if block.kind == "call" else {**place, "content_index": 0}

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        item: dict[str, Any] = {"id": self._item_id(block), "status": status}
        content = [] if status == "in_progress" else [_part(block.kind, block.text)]
        if block.kind == "call":
            called = {"call_id": block.id, "name": block.name, "arguments": block.text}
            return {"type": "function_call", **item, **called}
        if block.kind == "reasoning":
            return {"type": "reasoning", **item, "summary": [], "content": content}
        return {"type": "message", **item, "role": "assistant", "content": content}


def _kind(block: Block) -> str:
    names = {"text": "output_text", "reasoning": "reasoning_text", "call": "function_call_arguments"}
    return f"response.{names[block.kind]}"


def _logprobs(block: Block) -> dict[str, Any]:
    return {"logprobs": []} if block.kind == "text" else {}


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: Usage, reasoning_tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
