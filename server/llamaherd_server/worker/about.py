"""`python -m llamaherd_server.worker.about CONFIG`: print a model's metadata as a ModelInfo in JSON.

CONFIG is a WorkerConfig as JSON. No weights are read. If the file cannot be read, the reason is printed and the
exit code is REFUSED. This runs in its own process because libllama may abort on a corrupt file.
"""

from __future__ import annotations

import sys

import msgspec

from llamaherd_server.wire.protocol import WorkerConfig
from llamaherd_server.worker.lib import Log, load
from llamaherd_server.worker.model import Model
from llamaherd_server.worker.room import REFUSED
from llamaherd_server.worker.weights import ModelError


def main() -> int:
    config = msgspec.json.decode(sys.argv[1], type=WorkerConfig)
    lib = load()
    log = Log(lib)
    lib.llama_backend_init()
    try:
        info = Model(lib, log, config, lambda _: None, weights=False).info()
    except ModelError as error:
        sys.stdout.write(str(error))
        return REFUSED
    sys.stdout.write(msgspec.json.encode(info).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
