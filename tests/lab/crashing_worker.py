"""The embedded engine's worker, but it aborts when it is to send the first token of the model $CRASHES_WITH (a sha256).

A server with tests/server/doubled on its PYTHONPATH and WORKER_DOUBLE=<this file> starts it in the place of its worker.
All other models are served.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from llamaherd_server.wire.protocol import Delta, FromWorker, Step
from llamaherd_server.worker.__main__ import main
from llamaherd_server.worker.channel import Channel

_send = Channel.send


def _abort_at_the_first_token(self: Channel, message: FromWorker) -> None:
    if isinstance(message, Step) and any(isinstance(event, Delta) for event in message.events):
        os.abort()
    _send(self, message)


if __name__ == "__main__":
    if Path(json.loads(sys.argv[2])["path"]).resolve().stem == os.environ["CRASHES_WITH"]:
        Channel.send = _abort_at_the_first_token  # type: ignore[method-assign]
    sys.exit(main())
