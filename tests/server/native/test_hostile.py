"""Requests that cost too much, or that llama-server dies of or prints, beside a stream of another client."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from ..conftest import Server, running
from ..engine.test_hostile import GRAMMARS, INT32
from .conftest import native

FORGED = '{"event":"request","key":"admin"}'


def ask(http: httpx.Client, path: str = "/v1/completions", **fields: Any) -> httpx.Response:
    most = {"max_tokens" if path.startswith("/v1") else "n_predict": 3}
    return http.post(path, json={"prompt": "Is water wet? Answer:", **most, **fields})


def state(http: httpx.Client) -> dict[str, Any]:
    told: dict[str, Any] = http.get("/admin/engine").json()
    return told


@contextmanager
def beside_a_stream(server: Server, http: httpx.Client) -> Iterator[None]:
    """llama-server streams to another client all the while, and has not been started again."""
    before = state(http)["restarts"]
    seen, over, broken = threading.Event(), threading.Event(), threading.Event()

    def stream() -> None:
        body = {"prompt": "A story:", "max_tokens": 400, "ignore_eos": True, "stream": True}
        while not over.is_set():
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as reply:
                for line in reply.iter_lines():
                    if over.is_set():
                        return
                    if '"error"' in line or reply.status_code != 200:
                        broken.set()
                    seen.set()

    thread = threading.Thread(target=stream)
    thread.start()
    try:
        assert seen.wait(60)
        yield
        seen.clear()
        assert seen.wait(60)
        assert not broken.is_set()
        assert state(http)["restarts"] == before
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("kind", ["nested", "doubled", "60,000 alternatives", "optional items", "left recursion"])
def test_a_hostile_grammar_fails_alone(server: Server, http: httpx.Client, kind: str) -> None:
    grammar, told = GRAMMARS[kind]
    with beside_a_stream(server, http):
        answers = [ask(http, grammar=grammar), ask(http, "/completion", grammar=grammar)]
    for answer in answers:
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_grammar")
        assert told in answer.json()["error"]["message"]


def test_no_grammar_writes_lines_of_the_log(server: Server, http: httpx.Client) -> None:
    assert ask(http, grammar=f"root ::= x\n{FORGED}\n").status_code == 400
    assert ask(http, "/completion", grammar=f"root ::= x\n{FORGED}\n").status_code == 400
    assert FORGED not in server.log.read_text()


def test_a_grammar_that_passes_is_kept_to(server: Server, http: httpx.Client) -> None:
    grammar = 'root ::= " yes" | " no"'
    with beside_a_stream(server, http):
        assert ask(http, grammar=grammar).json()["choices"][0]["text"] in (" yes", " no")
        assert ask(http, "/completion", grammar=grammar).json()["content"] in (" yes", " no")


def test_runs_of_special_tokens_are_tokenised_without_llama_servers_threads(server: Server, http: httpx.Client) -> None:
    text = "<|im_end|>" * 50_000
    with beside_a_stream(server, http):
        assert len(http.post("/tokenize", json={"content": text}).json()["tokens"]) == 50_000
        assert http.post("/v1/completions", json={"prompt": text}).json()["error"]["param"] == "prompt"


@pytest.mark.parametrize("path", ["/v1/completions", "/completion"])
def test_values_that_allocate_are_bounded_by_the_context(http: httpx.Client, path: str) -> None:
    fields = {"repeat_last_n": INT32, "repeat_penalty": 1.1, "dry_multiplier": 1, "dry_penalty_last_n": INT32}
    before = state(http)["restarts"]
    assert ask(http, path, **fields).status_code == 200
    assert state(http)["restarts"] == before


LAZY = {"grammar": 'root ::= "a"', "grammar_lazy": True}
COSTLY: dict[str, dict[str, Any]] = {
    "a schema of no value": {"json_schema": {"$ref": "#"}},
    "a trigger that backtracks": {**LAZY, "grammar_triggers": [{"type": 2, "value": "((.*)*)*#$"}]},
    "a trigger that is no pattern": {**LAZY, "grammar_triggers": [{"type": 3.5, "value": "(["}]},
    "a schema beside a grammar": {**LAZY, "json_schema": {"type": "null"}},
    "100,000 samplers": {"samplers": "k" * 100_000},
    "50,000 probabilities of each token": {"n_probs": 50_000},
}


@pytest.mark.parametrize("name", COSTLY)
def test_what_llama_server_would_compute_beside_its_streams_is_bounded(
    server: Server, http: httpx.Client, name: str
) -> None:
    with beside_a_stream(server, http):
        answer = ask(http, "/completion", **COSTLY[name])
    assert (answer.status_code, answer.json()["error"]["param"] in (*COSTLY[name], "grammar")) == (400, True)


def test_a_schema_and_a_trigger_are_kept_to(server: Server, http: httpx.Client) -> None:
    schema = {"json_schema": {"enum": ["a herd", "a flock"]}, "n_predict": 16}
    ambiguous = {"type": "string", "pattern": "^" + "(a|b|)" * 100 + "$"}
    with beside_a_stream(server, http):
        assert ask(http, "/completion", **schema).json()["content"] in ('"a herd"', '"a flock"')
        assert ask(http, "/completion", json_schema=ambiguous).status_code == 200
        assert ask(http, "/completion", **LAZY, grammar_triggers=[{"type": 1, "value": "zebra"}]).status_code == 200


NOISY = """#!/bin/sh
head -c 300000 /dev/zero | tr '\\0' x >&2
(sleep 2; head -c 300000 /dev/zero | tr '\\0' x >&2; echo >&2) &
exec {binary} "$@"
"""


def test_long_lines_and_sigkill_do_not_end_the_server(tmp_path: Path) -> None:
    engine = native()
    program = tmp_path / "llama-server"
    program.write_text(NOISY.format(binary=engine["binary"]))
    program.chmod(0o755)
    with running(tmp_path, engine={**engine, "binary": str(program)}) as server:
        http = httpx.Client(base_url=server.url, timeout=60)
        for number in range(2):
            deadline = time.monotonic() + 60
            while server.log.read_bytes().count(b"x") < 600_000 * (number + 1):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert ask(http).status_code == 200
            os.kill(llama_server(server), signal.SIGKILL)
            while state(http)["restarts"] == number or http.get("/readyz").status_code != 200:
                assert time.monotonic() < deadline
                assert server.process.poll() is None
                time.sleep(0.1)
        assert ask(http).status_code == 200


def llama_server(server: Server) -> int:
    pids = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return next(int(pid) for pid in pids if Path(f"/proc/{pid}/comm").read_text().strip() == "llama-server")
