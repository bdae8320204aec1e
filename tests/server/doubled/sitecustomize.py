"""Python runs this at its start where PYTHONPATH names its folder: a server starts $WORKER_DOUBLE as its worker."""

import os
import sys

if "llamaherd_server" in sys.orig_argv:
    from llamaherd_server.engine import process

    process.PROGRAM = (os.environ["WORKER_DOUBLE"],)
