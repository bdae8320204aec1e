"""`python -m llamaherd_server.worker.room CONFIG [RUNNING]`: whether there is memory for a llama-server.

Each is a NativeConfig as JSON; RUNNING is the process that ends first. Exits with REFUSED and the reason on standard
output where there is none. The weights are only read about; a process of its own, for libllama may abort at a bad file.
"""

from __future__ import annotations

import sys

import msgspec
from msgspec.structs import replace

from llamaherd_server.wire.protocol import NativeConfig, WorkerConfig
from llamaherd_server.worker.lib import Log, load
from llamaherd_server.worker.memory import DoesNotFit, check_fits, context_bytes
from llamaherd_server.worker.model import Model
from llamaherd_server.worker.weights import ModelError

REFUSED = 3


def main() -> int:
    new, *running = (msgspec.json.decode(word, type=NativeConfig) for word in sys.argv[1:])
    lib = load()
    log = Log(lib)
    log.muted = new.placement.gpu_layers == "auto"  # llama-server says what became of it
    lib.llama_backend_init()
    try:
        placement = new.placement if new.placement.gpu_layers != "auto" else replace(new.placement, gpu_layers=-1)
        bare = WorkerConfig(path=new.path, placement=placement, settings=new.settings)
        model = Model(lib, log, bare, lambda _: None, weights=False)
        # Weights that are mapped count as available: they are file cache.
        released = sum(context_bytes(model, one.settings) for one in running) - lib.llama_model_size(model.handle)
        check_fits(model, new.settings, released=released)
    except (ModelError, DoesNotFit) as error:
        sys.stdout.write(str(error))
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
