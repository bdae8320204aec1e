"""Blocks of Anthropic's API that hold texts to answer from: documents and search results, as text."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from llamaherd_server.api.fields import Lenient
from llamaherd_server.errors import shown, unsupported


class _Source(Lenient):
    """A text that has a title; `citations`, which nobody makes here, must not be wanted of it."""

    title: str | None = None
    citations: Any = Field(None, description="Only with `enabled` false: the answer cites nothing.")

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if isinstance(self.citations, dict) and self.citations.get("enabled"):
            raise unsupported("messages", "messages: citations are not made here: leave them out")
        self.text  # noqa: B018 (raises for what is no text)
        return self

    @property
    def text(self) -> str:
        """What the model is shown; raises what a validator may."""
        raise NotImplementedError


class DocumentBlock(_Source):
    """A document of text. A PDF, or one at an address, is refused."""

    type: Literal["document"]
    source: dict[str, Any] = Field(description="Of the type `text`, with `data`, or `content`, with text in it.")
    context: str | None = None

    @property
    def text(self) -> str:
        kind = self.source.get("type")
        if kind not in ("text", "content"):
            message = f"messages: a document with a source of type {shown(str(kind))} is not supported: send its text"
            raise unsupported("messages", message)
        text = _text(self.source.get("data" if kind == "text" else "content"))
        return "\n".join(filter(None, (self.title, self.context, text)))


class SearchResultBlock(_Source):
    """What a search of the client's own found."""

    type: Literal["search_result"]
    source: str
    content: Any

    @property
    def text(self) -> str:
        return "\n".join(filter(None, (self.title, self.source, _text(self.content))))


def _text(content: Any) -> str:
    blocks = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [block.get("text") if isinstance(block, dict) and block.get("type") == "text" else None for block in blocks]
    if not all(isinstance(text, str) for text in texts):
        raise unsupported("messages", "messages: a document or search result has other content than text: send text")
    return "\n".join(map(str, texts))
