"""Images and the like in chats: data only, and only where the model can take them."""

from __future__ import annotations

from typing import Any

import pytest

from llamaherd_server.api.openai.chat import ChatRequest

from .conftest import Serve
from .double import Double

PNG = "data:image/png;base64,AAAA"


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
