"""Images and the like in chats: data only, and only where the model can take them."""

from __future__ import annotations

from typing import Any

import pytest

from llamaherd_server.api.anthropic.messages import CountRequest
from llamaherd_server.api.openai.chat import ChatRequest
from llamaherd_server.api.openai.responses import ResponsesRequest

from .conftest import Serve
from .double import Double

PNG = "data:image/png;base64,AAAA"
IMAGE_BLOCK = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}},
        {"type": "image_url", "image_url": "file:///etc/passwd"},
        {"type": "image_url", "image_url": {"url": "HTTP://127.0.0.1/"}},
        {"type": "image_url", "image_url": {"url": "data:text/plain;base64,AAAA"}},
        {"type": "image_url", "image_url": {"url": "data:image/png,AAAA"}},
        {"type": "image_url", "image_url": {"url": ["x"]}},
        {"type": "image_url"},
        {"type": "input_audio", "input_audio": {"data": "http://127.0.0.1/a.wav", "format": "wav"}},
        {"type": "input_audio", "input_audio": {"url": "http://127.0.0.1/a.wav"}},
        {"type": "input_audio", "input_audio": {"data": "not base64"}},
        {"type": "input_video", "input_video": {"url": "file:///etc/passwd"}},
        {"type": "video_url", "video_url": {"url": "http://127.0.0.1/a.mp4"}},
        {"type": "audio_url", "audio_url": {"url": PNG}},
        {"type": "file", "file": {"file_data": PNG}},
        {"type": "media_marker", "text": "x"},
    ],
)
async def test_nothing_is_fetched_or_read(serve: Serve, part: dict[str, Any]) -> None:
    async with serve(double := Double()) as served:
        reply = await served.chat(messages=[{"role": "user", "content": [part]}])
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "messages"
    assert not double.seen


async def test_a_model_without_a_projector_takes_none(serve: Serve) -> None:
    async with serve(double := Double()) as served:
        part = {"type": "image_url", "image_url": {"url": PNG}}
        reply = await served.chat(messages=[{"role": "user", "content": [part]}])
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "unsupported")
    assert "mmproj" in reply.json()["error"]["message"]
    assert not double.seen


def test_what_is_sent_stands_at_its_place() -> None:
    parts = [
        {"type": "text", "text": "Which?"},
        {"type": "image_url", "image_url": {"url": PNG, "detail": "low"}},
        {"type": "input_audio", "input_audio": {"data": "BBBB", "format": "wav"}},
    ]
    conversation = ChatRequest.model_validate({"messages": [{"role": "user", "content": parts}]}).conversation()
    media = conversation.media.media()
    assert media is not None
    assert conversation.messages[0]["content"] == f"Which?\n{media.marker}\n{media.marker}"
    assert media.data == ["AAAA", "BBBB"]


def said(media: Any, messages: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """What stands in each message, M where media are; and their data."""
    found = media.media()
    assert found is not None
    return [one["content"].replace(found.marker, "M") for one in messages], found.data


def test_images_of_anthropics_messages_and_of_tool_results() -> None:
    def image(data: str) -> dict[str, Any]:
        return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}

    use = {"type": "tool_use", "id": "t1", "name": "look", "input": {}}
    turns = [
        {"role": "user", "content": [image("AAAA"), {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": [image("BBBB")]}]},
        {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": PNG}}]},
    ]
    conversation = CountRequest.model_validate({"messages": turns}).conversation()
    texts, data = said(conversation.media, conversation.messages)
    assert texts == ["M\nWhat is it?", "", "M", "M"]
    assert data == ["AAAA", "BBBB", "AAAA"]


def test_images_and_sound_of_responses() -> None:
    parts = [
        {"type": "input_text", "text": "Which?"},
        {"type": "input_image", "image_url": PNG, "detail": "auto"},
        {"type": "input_audio", "input_audio": {"data": "BBBB", "format": "wav"}},
    ]
    items = [
        {"role": "user", "content": parts},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_image", "image_url": PNG}]},
    ]
    conversation = ResponsesRequest.model_validate({"input": items}).to_prepare()
    texts, data = said(conversation.media, conversation.messages)
    assert texts == ["Which?\nM\nM", "", "M"]
    assert data == ["AAAA", "BBBB", "AAAA"]


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": [IMAGE_BLOCK]}]}),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": PNG}]}]}),
    ],
)
async def test_every_route_says_what_images_need(serve: Serve, route: str, body: dict[str, Any]) -> None:
    async with serve(double := Double()) as served:
        reply = await served.http.post(route, json=body)
    assert reply.status_code == 400
    assert "needs a model with mmproj" in reply.json()["error"]["message"]
    assert not double.seen
