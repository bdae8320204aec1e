"""POST /v1/audio/transcriptions, as a chat of one message with the audio, like llama-server's."""

from __future__ import annotations

import base64
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from llamaherd_server.api.answer import Choice, answer, run_of
from llamaherd_server.api.conversation import Conversation, prepare
from llamaherd_server.api.fields import Ignored, Limit, OpenAiFields, SamplingFields
from llamaherd_server.api.media import Collected, MediaPart
from llamaherd_server.api.routing import ModelRoute
from llamaherd_server.api.sampling import most_tokens, resolve_sampling
from llamaherd_server.api.state import state_of
from llamaherd_server.api.wire import error_event, event
from llamaherd_server.engine.base import Event
from llamaherd_server.errors import ApiError
from llamaherd_server.http.form import decode_form
from llamaherd_server.http.json_body import run_off_loop
from llamaherd_server.serving.meter import Usage
from llamaherd_server.toolcalls.reader import Reader
from llamaherd_server.toolcalls.reply import Content, Parser
from llamaherd_server.wire.protocol import Delta, Finished

# llama.cpp's common_chat_get_asr_prompt: LFM2's audio models take the instruction as a system message.
_INSTRUCTION, _LFM2, _LFM2_INSTRUCTION = "Transcribe audio to text", "<|tool_list_start|>", "Perform ASR."


_JSON = (b"content-type", b"application/json")  # for FastAPI, which reads by `json` what is not a form any more


class _FormRoute(ModelRoute):
    async def read(self, request: Request) -> None:
        work = partial(decode_form, await request.body(), request.headers.get("content-type", "none"))
        request.state.json = form = await run_off_loop(request, work)
        for name, value in form.items():
            if name != "file" and isinstance(value, bytes):  # pydantic would read it as text, choose_model does not
                raise ApiError(400, f"{name[:64]}: is a file, not text", param=name[:64], code="invalid_value")
        others = [(name, content) for name, content in request.scope["headers"] if name != b"content-type"]
        request.scope["headers"] = [*others, _JSON]


router = APIRouter(route_class=_FormRoute)


class TranscriptionRequest(SamplingFields, OpenAiFields):
    """A recording, and how to transcribe it. Fields of a form are texts, from which numbers are read."""

    file: Annotated[bytes, Field(min_length=1, description="The recording: WAV, MP3 or FLAC.")]
    model: str | None = None
    prompt: str | None = Field(None, description="The instruction in place of the default one.")
    language: str | None = Field(None, max_length=64, description="The language, named in the instruction.")
    response_format: Literal["json", "text"] = "json"
    stream: bool = False
    max_tokens: Limit = None
    chunking_strategy: Ignored = None

    def conversation(self, template: str) -> Conversation:
        """Return what is to be rendered by a chat template; raises PydanticCustomError."""
        media = Collected()
        data = base64.b64encode(self.file).decode()
        marker = media.place(MediaPart.model_validate({"type": "input_audio", "input_audio": {"data": data}}))
        lfm2 = _LFM2 in template and not self.prompt
        text = "" if lfm2 else self.prompt or _INSTRUCTION
        language = f" (language: {self.language})" if self.language else ""
        system = [{"role": "system", "content": _LFM2_INSTRUCTION}] if lfm2 else []
        return Conversation([*system, {"role": "user", "content": f"{text}{language}{marker}"}], media=media)


@router.post("/v1/audio/transcriptions", response_class=Response, include_in_schema=False)
@router.post("/audio/transcriptions", response_class=Response, include_in_schema=False)
async def transcriptions(body: TranscriptionRequest, request: Request) -> Response:
    """Transcribe a recording."""
    state = state_of(request)
    if not state.takes_media:
        message = "file: audio needs a model with mmproj and the engine llama-server"
        raise ApiError(400, message, param="file", code="unsupported")
    state.check_model(body.model, request.state.key)
    await resolve_sampling(state, body)
    if body.temperature is None:  # OpenAI's default
        body.temperature = 0
    template = state.model_info().chat_template or ""
    chat = await prepare(state, await run_off_loop(request, partial(body.conversation, template)))
    generation = chat.generate(body.sampling(), max_tokens=most_tokens(state, body.max_tokens))
    shape = _Transcript(chat.reader, plain=body.response_format == "text")
    return await answer(request, run_of(request, [generation]), shape, stream=body.stream)


class _Transcript:
    """OpenAI's transcription: an object, its text alone if `plain`, or events."""

    def __init__(self, reader: Reader, *, plain: bool) -> None:
        self._reader, self._plain = reader, plain
        self._parser: Parser = reader.parser()
        self._text = ""

    def chunk(self, index: int, event_: Event) -> bytes:  # noqa: ARG002 (there is one)
        """The events for what was added to the text."""
        pieces = self._parser.feed(event_.text) if isinstance(event_, Delta) else []
        if isinstance(event_, Finished):
            pieces = self._parser.finish()
        added = "".join(piece.text for piece in pieces if isinstance(piece, Content))
        self._text += added
        return event("transcript.text.delta", delta=added) if added else b""

    def end(self, usage: Usage) -> bytes:
        return event("transcript.text.done", text=self._text, usage=_usage(usage))

    def error(self, error: ApiError) -> bytes:
        return error_event(error)

    def whole(self, choices: list[Choice], usage: Usage) -> Any:
        text = self._reader.whole(choices[0].text).content
        return Response(text, media_type="text/plain") if self._plain else {"text": text, "usage": _usage(usage)}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "type": "tokens",
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "input_token_details": {"cached_tokens": usage.cached_tokens},
    }
