"""sd_notify(3): reports the service's state to systemd through the datagram socket named in the environment."""

from __future__ import annotations

import os
import socket


class Notifier:
    """Sends to NOTIFY_SOCKET; without it, calls do nothing. `watchdog_s` is None if systemd runs no watchdog."""

    def __init__(self) -> None:
        address = os.environ.get("NOTIFY_SOCKET")
        watchdog_us = os.environ.get("WATCHDOG_USEC")
        for_me = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog_s = int(watchdog_us) / 1e6 if watchdog_us and for_me else None
        self._address = "\0" + address[1:] if address and address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) if address else None
        if self._socket:
            self._socket.setblocking(False)
        self._unsent: dict[str, str] = {}

    def send(self, *assignments: str) -> None:
        """Send NAME=value assignments. If systemd's queue is full, keep each name's latest value for the next call.

        A systemd that does not read must neither fail nor block the service.
        """
        if self._socket is None or self._address is None:
            return
        for assignment in assignments:
            name = assignment.partition("=")[0]
            self._unsent[name] = assignment
        try:
            self._socket.sendto("\n".join(self._unsent.values()).encode(), self._address)
            self._unsent.clear()
        except BlockingIOError:
            self._unsent.pop("WATCHDOG", None)  # a delayed heartbeat would hide a wedged server
        except OSError:
            self._socket.close()
            self._socket = None
