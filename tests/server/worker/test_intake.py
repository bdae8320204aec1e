"""The thread that reads: what it answers itself, what it hands on, and when it stops the step in progress."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from types import SimpleNamespace

import msgspec
import pytest

from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.wire.protocol import Cancel, Detokenize, Embed, Failed, FromWorker, Generate, Retune, Text
from llamaherd_server.worker.channel import LENGTH_BYTES, Channel, Closed, frame
from llamaherd_server.worker.intake import Intake
from llamaherd_server.worker.interrupt import BATCH_WINDOW_S, Interrupt
from llamaherd_server.worker.model import Model

SOON_S = 20
decoder: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


class Counted(Interrupt):
    """Counts how often a step was stopped."""

    stops = 0

    def set(self) -> None:
        super().set()
        self.stops += 1


class Front:
    """The front end's end of the socket, and the intake at the other."""

    def __init__(self, model: Model) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(SOON_S)
        self.interrupt = Counted(model.lib, model.log)
        self.intake = Intake(Channel(theirs), model, self.interrupt)

    def send(self, *messages: object) -> None:
        for message in messages:
            self.socket.sendall(frame(message))

    def take(self, count: int) -> list[object]:
        works: list[object] = []
        while len(works) < count:
            works += self.intake.take(SOON_S)
        return works

    def answer(self) -> FromWorker:
        size = int.from_bytes(self.socket.recv(LENGTH_BYTES, socket.MSG_WAITALL), "big")
        return decoder.decode(self.socket.recv(size, socket.MSG_WAITALL))


@pytest.fixture
def front(model: Model) -> Iterator[Front]:
    made = Front(model)
    yield made
    made.socket.close()


def test_work_comes_in_its_order_and_what_needs_no_context_is_answered_at_once(front: Front) -> None:
    front.send(
        Generate(id=1, prompt="a herd"),
        Detokenize(2, [9999999]),
        Generate(id=3, prompt=""),
        Embed(4, ["a", "b"]),
        Cancel(1),
    )
    works = front.take(3)
    assert [getattr(work, "id", None) for work in works] == [1, 4, 1]
    for number, told in ((2, "token 9999999"), (3, "the prompt is empty")):
        answer = front.answer()
        assert isinstance(answer, Failed)
        assert answer.id == number
        assert told in answer.message
    front.send(Detokenize(5, [28]))
    assert isinstance(front.answer(), Text)


def test_a_retune_and_cancelling_who_has_most_of_the_batch_stop_the_step(front: Front) -> None:
    front.interrupt.mostly_for = 7
    front.send(Cancel(6))
    front.take(1)
    assert front.interrupt.stops == 0
    front.send(Cancel(7), Retune(8, EngineSettings()))
    front.take(2)
    front.send(Cancel(6))  # read after the two, so that they have been dealt with
    front.take(1)
    assert front.interrupt.stops == 2


def test_only_who_comes_just_after_the_first_stops_the_first_step(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("llamaherd_server.worker.interrupt.time", SimpleNamespace(monotonic=lambda: now))

    def stops_after_arrival() -> int:
        front.send(Generate(id=1, prompt="a herd"), Cancel(0))
        front.take(2)
        return front.interrupt.stops

    assert stops_after_arrival() == 0  # nothing runs
    front.interrupt.update_batch_window(True)
    assert stops_after_arrival() == 1
    now += BATCH_WINDOW_S * 0.9
    front.interrupt.update_batch_window(True)  # the step that was stopped, once more
    assert stops_after_arrival() == 2
    now += BATCH_WINDOW_S * 0.2
    front.interrupt.update_batch_window(True)
    assert stops_after_arrival() == 2
    front.interrupt.update_batch_window(False)
    front.interrupt.update_batch_window(True)
    assert stops_after_arrival() == 3


def test_a_front_end_that_has_gone_ends_the_step_thread_too(front: Front) -> None:
    front.socket.close()
    with pytest.raises(Closed):
        front.take(1)
