"""A draft model beside the model: the same answers, and clear words where drafts cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.mtp_model import mtp_model
from tests.random_models import RandomModel

from ..conftest import required, running, write_config
from .conftest import native

KINDS = pytest.mark.parametrize("kind", ["llama-server", "embedded"])
ASK = {"prompt": "Numbers: one, two, three,", "max_tokens": 24, "temperature": 0}


def engine(http: httpx.Client, **changed: Any) -> httpx.Response:
    return http.put("/admin/engine", json=changed, timeout=120)


def on(kind: str, **more: Any) -> dict[str, Any]:
    """The [engine] table."""
    small = {"ctx_per_slot": 256, "parallel": 2, **more}
    return native(**small) if kind == "llama-server" else small


def test_a_draft_model_changes_no_answer_and_its_drafts_are_counted(tmp_path: Path) -> None:
    """The model drafts for itself, and so nearly always right."""
    drafting = on("llama-server", speculative="draft")
    model = {"draft": required("LLAMAHERD_TEST_MODEL")}
    with (
        running(tmp_path, engine=drafting, model=model) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        drafted = http.post("/completion", json=ASK).json()
        assert drafted["timings"]["draft_n_accepted"] > 8
        assert "llamaherd_accepted_tokens_total{" in http.get("/metrics").text
        assert engine(http, speculative="off").json()["settings"]["speculative"] == "off"
        alone = http.post("/completion", json=ASK).json()
        assert alone["timings"].get("draft_n", 0) == 0
        assert alone["content"] == drafted["content"]


@KINDS
def test_the_models_own_head_changes_no_answer(tmp_path: Path, kind: str) -> None:
    model = {"path": str(mtp_model("token"))}
    with (
        running(tmp_path, engine=on(kind, speculative="mtp"), model=model) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        drafted = http.post("/completion", json=ASK).json()
        assert drafted["timings"]["draft_n_accepted"] > 8
        assert engine(http, speculative="off").json()["settings"]["speculative"] == "off"
        alone = http.post("/completion", json=ASK).json()
        assert alone["timings"].get("draft_n", 0) == 0
        assert alone["content"] == drafted["content"]


@KINDS
def test_what_cannot_draft_says_so_and_goes_on(tmp_path: Path, kind: str) -> None:
    with (
        running(tmp_path, engine=on(kind)) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        refused = engine(http, speculative="draft")
        assert (refused.status_code, "needs draft: the GGUF" in refused.text) == (400, True), refused.text
        if kind == "embedded":
            assert "only a start with mtp loads" in engine(http, speculative="mtp").text
        assert http.get("/admin/engine").json()["settings"]["speculative"] == "off"
        assert http.post("/v1/completions", json=ASK).status_code == 200


@KINDS
def test_a_draft_model_of_another_vocabulary_is_one_clear_line(tmp_path: Path, kind: str) -> None:
    other = RandomModel("dense", layers=1, width=64, vocab=60_000).path()
    config = write_config(tmp_path, engine=on(kind, speculative="draft"), model={"draft": str(other)})
    ended = subprocess.run(
        [sys.executable, "-m", "llamaherd_server", "--config", str(config)],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert ended.returncode != 0
    assert f"draft {other} has a different vocabulary (it has" in ended.stderr
    assert "Traceback" not in ended.stderr
