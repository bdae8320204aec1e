"""From one engine to the other while the server runs, with the real model on both."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from ..conftest import Server, required, running
from .conftest import native

ASK = {"messages": [{"role": "user", "content": "Count from one to nine."}], "max_tokens": 24, "temperature": 0}
LONG = {"prompt": "Once upon a time", "max_tokens": 150, "stream": True, "temperature": 0}
# llama-server, but with three slots something that refuses a flag.
PROGRAM = """#!/bin/sh
case "$*" in
    *"--parallel 3 "*) exec {binary} "$@" --no-such-flag ;;
    *) exec {binary} "$@" ;;
esac
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """On the embedded engine, with llama-server where a build has it."""
    folder = tmp_path_factory.mktemp("switch")
    environment = build(folder)
    program = folder / "bin" / "llama-server"
    program.parent.mkdir()
    program.write_text(PROGRAM.format(binary=native()["binary"]))
    program.chmod(0o755)
    with running(folder, environment) as started:
        yield started


def build(folder: Path) -> dict[str, str]:
    """The environment of a server whose llama.cpp is in `folder`, without programs."""
    (folder / "lib").symlink_to(required("LLAMAHERD_TEST_LIB_DIR"))
    return {"LLAMA_CPP_LIB_PATH": str(folder / "lib")}


def put(http: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = http.put("/admin/engine", json=body)
    assert answer.status_code == 200, answer.text
    described: dict[str, Any] = answer.json()
    return described


def steps(http: httpx.Client) -> float:
    """What the embedded engine told of its steps."""
    name = "llamaherd_step_decode_seconds_count"
    return next(float(line.split()[1]) for line in http.get("/metrics").text.splitlines() if line.startswith(name))


def test_it_goes_there_and_back_and_all_that_wait_are_answered(server: Server, http: httpx.Client) -> None:
    alone = http.post("/v1/chat/completions", json=ASK).json()["choices"][0]["message"]["content"]
    own = {"prompt": "Hello", "n_predict": 2, "temperature": 0}
    completed = http.post("/completion", json=own).json()["content"]
    before = http.get("/admin/engine").json()
    for engine in ("llama-server", "embedded"):
        begun = threading.Event()

        def stream(begun: threading.Event = begun) -> str:
            with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as response:
                begun.set()
                return response.read().decode()

        def queued(_: int) -> str:
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=ASK, timeout=60)
            return str(answer.json()["choices"][0]["message"]["content"])

        with ThreadPoolExecutor(8) as pool:
            streamed = pool.submit(stream)
            assert begun.wait(60)
            answers = pool.map(queued, range(6))
            switched = put(http, engine=engine, ubatch=64)
            assert set(answers) == {alone}
            assert streamed.result().rstrip().endswith("data: [DONE]")
            assert "error" not in streamed.result()
        assert (switched["engine"], switched["state"], switched["settings"]["ubatch"]) == (engine, "ready", 64)
        assert http.get("/admin/engine").json()["engine"] == engine
        assert http.post("/completion", json=own).json()["content"] == completed
        assert http.get("/props").json()["total_slots"] == len(http.get("/slots").json()) == 2
    assert put(http, **before["settings"])["settings"] == before["settings"]
    counted = steps(http)
    assert http.post("/v1/chat/completions", json=ASK).status_code == 200
    assert steps(http) > counted


def test_where_the_other_does_not_start_the_former_comes_back(http: httpx.Client) -> None:
    before = http.get("/admin/engine").json()
    refused = http.put("/admin/engine", json={"engine": "llama-server", "parallel": 3})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "does_not_fit")
    assert "no-such-flag" in refused.json()["error"]["message"]
    after = http.get("/admin/engine").json()
    assert (after["engine"], after["settings"], after["state"]) == ("embedded", before["settings"], "ready")
    assert http.post("/v1/chat/completions", json=ASK).status_code == 200


@pytest.mark.parametrize("engine", ["vllm", None, 1])
def test_an_unknown_engine_is_a_400(http: httpx.Client, engine: Any) -> None:
    refused = http.put("/admin/engine", json={"engine": engine})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_value")
    assert "'embedded' or 'llama-server'" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("to", "told"),
    [("llama-server", "is not an executable program"), ("embedded", "extra_args and rpc are for kind")],
)
def test_what_the_other_engine_cannot_do_changes_nothing(tmp_path: Path, to: str, told: str) -> None:
    engine = native(extra_args=["--embeddings"]) if to == "embedded" else {}
    with (
        running(tmp_path, build(tmp_path), engine=engine) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        refused = http.put("/admin/engine", json={"engine": to})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_value")
        assert told in refused.json()["error"]["message"]
        assert http.get("/admin/engine").json()["engine"] != to
        assert http.post("/v1/chat/completions", json=ASK).status_code == 200
