"""The service keeps serving when systemd does not read, and systemd misses nothing that matters."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from llamaherd_server.process.sdnotify import Notifier


def test_what_a_full_queue_refused_is_sent_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    told.bind(str(tmp_path / "notify"))
    told.setblocking(False)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    notifier = Notifier()
    for number in range(2000):
        notifier.send(f"STATUS={number}")
    notifier.send("WATCHDOG=1")
    notifier.send("STOPPING=1")
    with pytest.raises(BlockingIOError):
        while told.recv(4096) != b"STATUS=1999":
            pass
    notifier.send("STATUS=draining")
    assert told.recv(4096).split(b"\n") == [b"STATUS=draining", b"STOPPING=1"]
    told.close()
