"""The real model, in this process."""

from __future__ import annotations

import pytest

from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.wire.protocol import WorkerConfig
from llamaherd_server.worker.lib import Log, load
from llamaherd_server.worker.model import Model

from ..conftest import required


@pytest.fixture(scope="package")
def model() -> Model:
    lib = load()
    lib.llama_backend_init()
    config = WorkerConfig(path=required("LLAMAHERD_TEST_MODEL"), settings=EngineSettings())
    return Model(lib, Log(lib), config, lambda _: None)
