"""`python -m llamaherd_server.worker.room CONFIG [RUNNING]`: checks whether a llama-server fits into memory.

Both are NativeConfigs as JSON; RUNNING is the process that ends first. If there is too little memory, prints the reason
and exits with REFUSED. Reads no weights. A process of its own, because libllama may abort on a bad file.
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
    log.muted = new.placement.gpu_layers == "auto"  # llama-server logs the actual placement
    lib.llama_backend_init()
    try:
        placement = new.placement if new.placement.gpu_layers != "auto" else replace(new.placement, gpu_layers=-1)
        bare = WorkerConfig(path=new.path, placement=placement, settings=new.settings)
        model = Model(lib, log, bare, lambda _: None, weights=False)
        # Mapped weights already count as available memory: they are file cache.
        released = sum(context_bytes(model, one.settings) for one in running) - lib.llama_model_size(model.handle)
        check_fits(model, new.settings, released=released)
    except (ModelError, DoesNotFit) as error:
        sys.stdout.write(str(error))
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
