"""sd_notify(3): tells systemd about the service's state through the datagram socket it names in the environment."""

from __future__ import annotations

import os
import socket


class Notifier:
    """Sends to NOTIFY_SOCKET; without one, calls do nothing. `watchdog_s` None: systemd asked for no watchdog."""

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
        """Send NAME=value assignments; while systemd's queue is full they wait for the next call, the newest of a name.

        A systemd that does not listen must not take the service down, nor hold it up.
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
            self._unsent.pop("WATCHDOG", None)  # a heartbeat that comes late would be a lie
        except OSError:
            self._socket.close()
            self._socket = None
