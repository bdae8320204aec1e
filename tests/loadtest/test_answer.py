"""What a server may put on the wire: however it is cut and framed, the client reads the same from it."""

from __future__ import annotations

from collections.abc import Iterator
from socket import IPPROTO_TCP, TCP_NODELAY

import gevent
import pytest
from gevent.server import StreamServer

from llamaherd_loadtest.client import ChatClient, Target, clock
from llamaherd_loadtest.samples import Sample

ROLE = b'data: {"choices":[{"delta":{"role":"assistant","content":null}}]}\n\n'
WORD = 'data: {"choices":[{"delta":{"content":"é \\"}"}}]}\n\n'.encode()
THOUGHT = b'data: {"choices": [{"delta": {"reasoning_content": "hm"}}]}\n\n'
FINISH = (
    b'data: {"choices":[{"delta":{},"finish_reason":"stop"}],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\n'
)
DONE = b"data: [DONE]\n\n"
STREAM = ROLE + THOUGHT + b": keepalive\n\n" + WORD + WORD + FINISH + DONE
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


class Wire:
    """A server that answers each request with `pieces`, one after the other, and then hangs up or not."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.hangs_up = False
        self.server = StreamServer(("127.0.0.1", 0), self._serve)
        self.server.start()
        self.client = ChatClient(Target(url=f"http://127.0.0.1:{self.server.server_port}", timeout_s=1.0))

    def _serve(self, sock: gevent.socket.socket, _: object) -> None:
        sock.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
        while sock.recv(65536):
            for piece in self.pieces:
                sock.sendall(piece)
                gevent.sleep(0)
            if self.hangs_up:
                sock.close()
                return

    def ask(self, *pieces: bytes, hangs_up: bool = False) -> tuple[Sample, str]:
        self.pieces, self.hangs_up = list(pieces), hangs_up
        sample, text = Sample(index=0, scheduled=clock()), list[str]()
        self.client.stream(b"{}", sample, text)
        return sample, "".join(text)


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire()
    yield wire
    wire.client.close()
    wire.server.stop()


def chunked(*parts: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return CHUNKED + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + end


def is_whole(answer: tuple[Sample, str]) -> bool:
    sample, text = answer
    return (sample.outcome, sample.events, sample.prompt_tokens, sample.tokens, text) == ("ok", 3, 7, 3, 'é "}é "}')


def test_a_cut_anywhere_changes_nothing(wire: Wire) -> None:
    whole = chunked(ROLE, THOUGHT + b": keepalive\n\n" + WORD, WORD + FINISH, DONE)
    assert all(is_whole(wire.ask(whole[:at], whole[at:])) for at in range(1, len(whole)))


@pytest.mark.parametrize(
    ("answer", "hangs_up"),
    [
        (chunked(STREAM), False),
        (chunked(*(STREAM[at : at + 7] for at in range(0, len(STREAM), 7))), False),
        (chunked(STREAM.replace(b"\n", b"\r\n")), False),
        (chunked(STREAM, end=b"0\r\nServer-Timing: total\r\n\r\n"), False),
        (chunked(STREAM.rstrip()), False),
        (chunked(STREAM.removesuffix(DONE)), False),
        (b"HTTP/1.1 103 Early Hints\r\n\r\n" + chunked(STREAM), False),
        (HEAD + b"Content-Length: %d\r\n\r\n" % len(STREAM) + STREAM, False),
        (HEAD + b"Connection: close\r\n\r\n" + STREAM, True),
    ],
    ids=[
        "one chunk",
        "small chunks",
        "CRLF",
        "trailer",
        "no last line end",
        "no DONE",
        "hints",
        "length",
        "till close",
    ],
)
def test_framing_changes_nothing(wire: Wire, answer: bytes, hangs_up: bool) -> None:
    for pieces in ([answer], [answer[at : at + 1] for at in range(len(answer))]):
        assert is_whole(wire.ask(*pieces, hangs_up=hangs_up))


def test_long_answers_lose_nothing(wire: Wire) -> None:
    sample, text = wire.ask(CHUNKED, *(chunked(WORD, end=b"").removeprefix(CHUNKED) for _ in range(1000)), b"0\r\n\r\n")
    assert (sample.events, len(text)) == (1000, 4000)
    assert sample.outcome == "truncated"


@pytest.mark.parametrize("error", [b'data: {"error":{"message":"gone"}}\n\n', b'error: {"message":"gone"}\n\n'])
def test_an_error_is_told_though_the_stream_goes_on(wire: Wire, error: bytes) -> None:
    sample, _ = wire.ask(CHUNKED, chunked(WORD, error, end=b"").removeprefix(CHUNKED))
    assert (sample.outcome, sample.detail, sample.events) == ("stream_error", "gone", 1)


def test_what_came_before_the_deadline_is_kept(wire: Wire) -> None:
    sample, _ = wire.ask(CHUNKED, chunked(WORD, WORD, end=b"").removeprefix(CHUNKED))
    assert (sample.outcome, sample.events) == ("timeout", 2)


def test_nonsense_is_a_protocol_error(wire: Wire) -> None:
    assert wire.ask(chunked(b"data: {nonsense}\n\n"))[0].outcome == "protocol"
    assert wire.ask(b"SSH-2.0-OpenSSH\r\n")[0].outcome == "protocol"
    assert is_whole(wire.ask(chunked(STREAM)))


def test_a_connection_that_was_closed_meanwhile_is_opened_anew(wire: Wire) -> None:
    for _ in range(3):
        assert is_whole(wire.ask(chunked(STREAM), hangs_up=True))
