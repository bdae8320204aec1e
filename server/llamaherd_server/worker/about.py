"""`python -m llamaherd_server.worker.about CONFIG`: what a model says of itself, its ModelInfo as JSON.

CONFIG is a WorkerConfig; no weights are read. Exits with REFUSED and the reason where the file cannot be read. A
process of its own, for libllama may abort at a bad one.
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
