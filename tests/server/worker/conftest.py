"""The real model, in this process."""

from __future__ import annotations

import pytest

from llamaherd_server.worker.lib import Log, load
from llamaherd_server.worker.model import Model

from ..conftest import required


@pytest.fixture(scope="package")
def model() -> Model:
    lib = load()
    lib.llama_backend_init()
    return Model(lib, Log(lib), required("LLAMAHERD_TEST_MODEL"), -1, lambda _: None)
