"""`python -m llamaherd_server.worker FD CONFIG`: the process that owns the model; its front end starts it."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading

import msgspec

from llamaherd_server.wire.protocol import ErrorCode, Failed, WorkerConfig
from llamaherd_server.worker.channel import Channel, Closed
from llamaherd_server.worker.memory import DoesNotFit
from llamaherd_server.worker.service import Service
from llamaherd_server.worker.weights import ModelError

_print_traceback = threading.excepthook

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> int:
    live_and_die_with_the_front_end()
    threading.excepthook = end_with_the_thread
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    try:
        Service(channel, msgspec.json.decode(sys.argv[2], type=WorkerConfig)).run()
    except Closed:
        return 0
    except (ModelError, DoesNotFit) as error:
        code: ErrorCode = "does_not_fit" if isinstance(error, DoesNotFit) else "invalid_value"
        channel.send(Failed(0, code, str(error)))
        return 1
    return 0


def live_and_die_with_the_front_end() -> None:
    """Signals to the whole group are the front end's to answer: it drains, then closes the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_with_the_thread(failed: threading.ExceptHookArgs) -> None:
    """Requests that a dead thread would never answer fail now, and the front end starts a whole worker."""
    _print_traceback(failed)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
