"""Recordings: what a form becomes, and forms that are none. No model hears anything here."""

from __future__ import annotations

import base64
import itertools
from pathlib import Path
from typing import Any

import openai
import pytest

from llamaherd_server.api.openai.transcriptions import TranscriptionRequest
from llamaherd_server.api.state import AppState
from llamaherd_server.errors import ApiError
from llamaherd_server.http.form import MAX_PARTS, decode_form

from .conftest import Serve, Served
from .double import Double

ROUTE = "/v1/audio/transcriptions"
SOUND = b"RIFF\r\n\r\n--x\r\n\0\xff"


@pytest.fixture
def hears(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AppState, "takes_media", True)


def client(served: Served) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{served.http.base_url}/v1", api_key="none", max_retries=0)


@pytest.mark.usefixtures("hears")
async def test_openais_client_gets_text(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "speech.wav").write_bytes(SOUND)
    async with serve(double := Double(tokens=3)) as served:
        transcriptions = client(served).audio.transcriptions
        asked: dict[str, Any] = {"model": "double", "file": tmp_path / "speech.wav"}
        whole = await transcriptions.create(**asked, language="de", temperature=0.5)
        plain = await transcriptions.create(**asked, response_format="text", prompt="Names: Ada.")
        stream = await transcriptions.create(**asked, stream=True)
        events = [event async for event in stream]
    assert whole.text == plain == "w0 w1 w2 "
    assert whole.usage is not None and whole.usage.type == "tokens" and whole.usage.total_tokens == 8
    assert {event.type for event in events[:-1]} == {"transcript.text.delta"}
    assert events[-1].type == "transcript.text.done"
    assert "".join(event.delta for event in events[:-1]) == events[-1].text == whole.text
    first, second, third = double.seen
    for request in double.seen:
        assert request.media is not None and request.media.data == [base64.b64encode(SOUND).decode()]
        assert request.media.marker in str(request.prompt)
    assert f"Transcribe audio to text (language: de){first.media and first.media.marker}" in str(first.prompt)
    assert "Names: Ada.<media-" in str(second.prompt)
    assert (first.sampling.temperature, third.sampling.temperature) == (0.5, 0)


@pytest.mark.usefixtures("hears")
@pytest.mark.parametrize(
    ("fields", "files", "param"),
    [
        ({}, {}, "file"),
        ({}, {"file": b""}, "file"),
        ({"file": "text"}, {"other": b"x"}, "other"),
        ({"response_format": "srt"}, {"file": SOUND}, "response_format"),
        ({"response_format": "verbose_json"}, {"file": SOUND}, "response_format"),
        ({"timestamp_granularities[]": "word"}, {"file": SOUND}, "timestamp_granularities[]"),
        ({"temperature": "hot"}, {"file": SOUND}, "temperature"),
        ({"model": "another"}, {"file": SOUND}, "model"),
        ({"prompt": "x" * 70_000}, {"file": SOUND}, "prompt"),
    ],
)
async def test_other_forms_are_refused(
    serve: Serve, fields: dict[str, str], files: dict[str, bytes], param: str
) -> None:
    sent = {name: (f"{name}.wav", content) for name, content in files.items()} or {"other": ("", b"x")}
    async with serve(double := Double()) as served:
        reply = await served.http.post(ROUTE, data={"model": "double", **fields}, files=sent)
    assert reply.status_code in (400, 404), reply.text
    assert reply.json()["error"]["param"] == param or not files, reply.text
    assert not double.seen


@pytest.mark.usefixtures("hears")
async def test_only_the_recording_may_be_a_file(serve: Serve) -> None:
    files = {"model": ("model.txt", b"double"), "file": ("a.wav", SOUND)}
    async with serve(double := Double()) as served:
        reply = await served.http.post(ROUTE, files=files)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "model")
    assert not double.seen


async def test_a_model_that_hears_nothing_says_so(serve: Serve) -> None:
    async with serve(Double()) as served:
        reply = await served.http.post(ROUTE, files={"file": ("a.wav", SOUND)})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "file")
    assert "needs a model with mmproj" in reply.json()["error"]["message"]


def part(name: str, content: bytes, head: str = "") -> bytes:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{head}\r\n\r\n'.encode() + content + b"\r\n"


FILE = part("file", SOUND, '; filename="../../a"')
FORM = "multipart/form-data; boundary=b"


def test_a_form_is_split_where_its_boundary_is() -> None:
    body = b"preamble\r\n" + part("model", "ä".encode()) + FILE + b"--b--\r\nepilogue"
    assert decode_form(body, 'Multipart/Form-Data; charset=utf-8; boundary="b"') == {"model": "ä", "file": SOUND}
    assert decode_form(b"--b--", FORM) == {}


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", FORM),
        (b"no boundary at all", FORM),
        (FILE, FORM),
        (FILE[:-20], FORM),
        (FILE + b"--b--", "multipart/form-data"),
        (FILE + b"--b--", "multipart/mixed; boundary=b"),
        (FILE + b"--b--", "application/json"),
        (FILE + b"--b--", "multipart/form-data; boundary=" + "b" * 10_000),
        (FILE + b"--b--", "multipart/form-data; x=" + "y" * 10_000 + "; boundary=b"),
        (b"--b\r\n\r\nx\r\n--b--", FORM),
        (b"--b\r\nContent-Disposition: attachment; name=x\r\n\r\nx\r\n--b--", FORM),
        (part("x", b"", "; y=" + "z" * 10_000) + b"--b--", FORM),
        (part("x", b"\xff") + b"--b--", FORM),
        (part("x", b"1") + part("x", b"2") + b"--b--", FORM),
        (b"".join(part(f"x{number}", b"") for number in range(MAX_PARTS + 1)) + b"--b--", FORM),
        (part("x", b"") * 10_000 + b"--b--", FORM),
        (b"\r\n--" * 2**20, FORM),
        (b"--b\r\n" * 2**20, FORM),
    ],
    ids=map(str, itertools.count()),
)
def test_what_is_no_form_is_a_400(body: bytes, kind: str) -> None:
    with pytest.raises(ApiError) as refused:
        decode_form(body, kind)
    assert refused.value.status_code == 400


def test_lfm2_gets_its_own_instruction() -> None:
    messages = TranscriptionRequest.model_validate({"file": SOUND}).conversation("<|tool_list_start|>").messages
    assert messages[0] == {"role": "system", "content": "Perform ASR."}
    assert messages[1]["content"].startswith("<media-")
