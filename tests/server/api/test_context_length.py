"""How long a context is where server.toml leaves it open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llamaherd_server.config.settings import Settings
from llamaherd_server.engine.context_length import with_context_length

from ..conftest import required


def settings(path: Path, **more: Any) -> Settings:
    return Settings.model_validate({"models": [{"name": "m", "path": path, **more}]})


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"memory_mib": 16384}, (8192, 0)),
        ({"memory_mib": 400}, (8192, 8704)),
        ({"memory_mib": 10, "engine": {"parallel": 2}}, (2048, 2048)),
        ({"memory_mib": 10, "engine": {"ctx_per_slot": 512}}, (512, 0)),
        ({"memory_mib": 16384, "engine": {"kv_cells": 1024}}, (1024, 1024)),
    ],
)
def test_it_is_decided_from_the_gguf_and_the_memory(more: dict[str, Any], expected: tuple[int, int]) -> None:
    found = with_context_length(settings(Path(required("LLAMAHERD_TEST_MODEL")), **more), 1)
    assert (found.ctx_per_slot, found.kv_cells) == expected


def test_without_a_figure_it_is_the_hosts_memory() -> None:
    found = with_context_length(settings(Path(required("LLAMAHERD_TEST_MODEL"))), 1)
    assert 2048 <= found.ctx_per_slot <= 8192


def test_a_header_that_says_too_little_gets_the_least(tmp_path: Path) -> None:
    (tmp_path / "odd.gguf").write_bytes(b"GGUF" + bytes(20))
    assert with_context_length(settings(tmp_path / "odd.gguf"), 1).ctx_per_slot == 2048
