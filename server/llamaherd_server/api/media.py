"""Images, audio and video in a chat. Their data must be in the request; the server fetches nothing."""

from __future__ import annotations

import base64
import binascii
import re
import uuid
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from llamaherd_server.api.fields import Lenient
from llamaherd_server.errors import unsupported
from llamaherd_server.wire.protocol import Media

_DATA_URL = re.compile(r"data:(?:image|audio|video)/[\w.+-]+(?:;[\w=.+-]+)*;base64,", re.ASCII)
_NAMES = {"image_url": "an image", "input_audio": "audio", "input_video": "video", "video_url": "video"}


class MediaPart(Lenient):
    """A media part of a message's content, for a model with a multimodal projector."""

    type: Literal["image_url", "input_audio", "input_video", "video_url"]
    image_url: Any = Field(None, description="A URL, or an object with one as `url`: `data:image/…;base64,…`.")
    input_audio: Any = Field(None, description="An object with base64 as `data`, or a data URL as `url`.")
    input_video: Any = Field(None, description="As `input_audio`.")
    video_url: Any = Field(None, description="As `image_url`.")

    @model_validator(mode="after")
    def _sound(self) -> Self:
        self.data()
        return self

    def data(self) -> str:
        """Return the part's data in base64. Raises PydanticCustomError, for use in a validator."""
        given = getattr(self, self.type)
        source = given if isinstance(given, dict) else {"url": given}
        data = source.get("data", source.get("url"))
        if not isinstance(data, str):
            raise unsupported("messages", f"messages: {self.type} has no data: send data:…;base64,…")
        if ":" in data:
            prefix = _DATA_URL.match(data)
            if prefix is None:
                message = f"messages: url {data[:40]!r} is not fetched: send the data as data:…;base64,…"
                raise unsupported("messages", message)
            data = data[prefix.end() :]
        try:
            base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            raise unsupported("messages", f"messages: the data of {self.type} is not valid base64") from None
        return data

    def refusal(self) -> str:
        """Return the error message for a model that does not accept media."""
        return f"messages: {_NAMES[self.type]} needs a model with mmproj and the engine llama-server"


class Collected:
    """The media of a conversation, in the order in which they appear in it."""

    def __init__(self) -> None:
        self.parts: list[MediaPart] = []
        self._marker = f"<media-{uuid.uuid4().hex}>"

    def place(self, part: MediaPart) -> str:
        """Add a part and return its marker for the text, which is random so that no text can contain it."""
        self.parts.append(part)
        return self._marker

    def media(self) -> Media | None:
        """Return the media in the engine's format; None: there are none."""
        return Media(self._marker, [part.data() for part in self.parts]) if self.parts else None
