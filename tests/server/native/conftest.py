"""A server whose engine is the real llama-server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ..conftest import Server, required, running


def native(**more: Any) -> dict[str, Any]:
    """The [engine] table."""
    binary = Path(required("LLAMAHERD_TEST_BIN_DIR")) / "llama-server"
    return {"kind": "llama-server", "binary": str(binary), **more}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    engine = native(extra_args=["--embeddings", "--pooling", "mean"])
    with running(tmp_path_factory.mktemp("native"), engine=engine) as started:
        yield started


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
