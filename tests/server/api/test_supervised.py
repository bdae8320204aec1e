"""The real process over a worker that is paced by the clock: what it survives, and what it says in its log."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from llamaherd_server.keyfile import add
from llamaherd_server.serving.quota import CRASHES
from tests.sse import events_of

from ..conftest import START_S, Server, paced, running, until_ready, write_config

PROMPT = "The patient's name is Zebulon Quince"


def until(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds; fails when it never does."""
    deadline = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def engine(server: Server) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.get(f"{server.url}/admin/engine").json()
    return answer


def worker(server: Server) -> int:
    pids = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return next(int(pid) for pid in pids if b"paced_worker" in Path(f"/proc/{pid}/cmdline").read_bytes())


def test_a_wedged_engine_is_restarted_and_what_was_queued_is_served(tmp_path: Path) -> None:
    with running(tmp_path, paced(), limits={"heartbeat_timeout_s": 2}) as server:
        first = worker(server)
        os.kill(first, signal.SIGSTOP)
        until(lambda: httpx.get(f"{server.url}/livez").status_code == 503 or engine(server)["restarts"] == 1)
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 2}, timeout=START_S)
        assert answer.status_code == 200
        assert httpx.get(f"{server.url}/livez").status_code == 200
        assert worker(server) != first
        assert (engine(server)["restarts"], "sent no heartbeat for 2 s" in engine(server)["last_error"]) == (1, True)


def test_a_worker_that_dies_while_nothing_can_be_logged_is_replaced(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    port = int(config.read_text().split("port = ")[1].split()[0])
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "llamaherd_server", "--config", str(config)]
        process = subprocess.Popen(command, stderr=full, env={**os.environ, **paced()})
    log = tmp_path / "no.log"
    log.touch()
    with until_ready(Server(f"http://127.0.0.1:{port}", process, log)) as server:
        os.kill(worker(server), signal.SIGKILL)
        until(lambda: engine(server)["restarts"] == 1 and httpx.get(f"{server.url}/readyz").status_code == 200)
        assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200


def test_a_worker_that_cannot_be_started_for_want_of_files_is_started_later(tmp_path: Path) -> None:
    with running(tmp_path, paced()) as server:
        pid = server.process.pid
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        with httpx.Client(base_url=server.url) as client:  # its connection is there before
            assert client.get("/readyz").status_code == 200
            gone = worker(server)
            files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (files - 3, limits[1]))  # what the worker had is free again
            os.kill(gone, signal.SIGKILL)
            until(lambda: "could not be run" in str(client.get("/admin/engine").json()["last_error"]))
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
            until(lambda: client.get("/readyz").status_code == 200)


def test_an_engine_that_takes_nothing_in_is_not_ready(tmp_path: Path) -> None:
    with running(tmp_path, paced()) as server:
        os.kill(worker(server), signal.SIGSTOP)
        until(lambda: httpx.get(f"{server.url}/readyz").status_code == 503)
        assert httpx.get(f"{server.url}/livez").status_code == 200
        os.kill(worker(server), signal.SIGCONT)
        until(lambda: httpx.get(f"{server.url}/readyz").status_code == 200)
        assert engine(server)["restarts"] == 0


def test_a_client_that_reads_nothing_loses_its_slot(tmp_path: Path) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 1_000_000, "n": 8, "stream": True}).encode()
    settings = {"parallel": 8, "ctx_per_slot": 2**20}
    with running(tmp_path, paced(step_ms=1), engine=settings, limits={"idle_client_timeout_s": 1}) as server:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
            head = (
                "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
            )
            client.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body)
            until(lambda: engine(server)["stats"]["slots_busy"] == 8)
            until(lambda: engine(server)["stats"]["slots_busy"] == 0)
        until(lambda: '"client_gone":true' in server.log.read_text())


def test_the_log_has_one_line_a_request_and_nothing_of_what_was_said(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    secret = add(keys, {"name": "team"})
    with running(tmp_path, paced(step_ms=1), auth={"keys_file": keys}) as server:
        client = httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {secret}"})
        chat = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 3}
        answers = [
            client.post("/v1/chat/completions", json=chat, headers={"X-Request-Id": "trace-7"}),
            client.post("/v1/chat/completions", json=chat | {"stream": True}),
            client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 3, PROMPT: 1}),
            client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": PROMPT}),
            client.post("/v1/completions", content=f'{{"prompt": "{PROMPT}'),
            client.post("/v1/chat/completions", json=chat, headers={"Authorization": f"Bearer {PROMPT}"}),
            client.get(f"/{PROMPT}?key={secret}"),
        ]
        server.process.send_signal(signal.SIGHUP)
        until(lambda: "keys reloaded" in server.log.read_text())
        assert server.terminate() == 0
    assert [answer.status_code for answer in answers] == [200, 200, 400, 400, 400, 401, 404]
    output = answers[0].json()["choices"][0]["message"]["content"]
    log = server.log.read_text()
    for private in ("Zebulon", "Quince", output.split()[0], secret):
        assert private not in log
    lines = [line for line in map(json.loads, log.splitlines()) if line["event"] == "request"]
    ids = [answer.headers["X-Request-Id"] for answer in answers]
    lines.sort(key=lambda line: ids.index(line["request_id"]))  # a stream's may follow the next request's
    assert [line["request_id"] for line in lines] == ids
    assert lines[0]["request_id"] == "trace-7"
    assert {name: lines[1][name] for name in ("key", "status", "completion_tokens", "path")} == {
        "key": "team",
        "status": 200,
        "completion_tokens": 3,
        "path": "/v1/chat/completions",
    }
    assert 0 < lines[1]["ttft_ms"] < lines[1]["ms"]


def test_requests_that_kill_workers_are_not_tried_again_and_cost_their_key_not_the_server(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    bad, good = ({"Authorization": f"Bearer {add(keys, {'name': name})}"} for name in ("bad", "good"))
    url = "/v1/completions"
    with running(tmp_path, paced(), auth={"keys_file": keys}) as server:
        client = httpx.Client(base_url=server.url, timeout=START_S)
        codes: list[str] = []
        while "rate" not in codes and len(codes) < 20:
            answer = client.post(url, json={"prompt": "die", "max_tokens": 2}, headers=bad)
            codes.append(answer.json()["error"]["code"] if answer.status_code == 500 else "rate")
            until(lambda: client.get("/readyz").status_code == 200)
        assert codes == ["engine_crashed"] * CRASHES + ["rate"]
        assert (answer.status_code, int(answer.headers["Retry-After"]) > 0) == (429, True)
        assert client.post(url, json={"prompt": "x", "max_tokens": 2}, headers=good).status_code == 200
        assert server.log.read_text().count('"event":"engine ended"') == CRASHES
        assert '"key":"bad"' in server.log.read_text()
        assert server.process.poll() is None


def test_workers_that_keep_dying_never_end_the_server(tmp_path: Path) -> None:
    with running(tmp_path, paced()) as server:
        for number in range(5):
            until(lambda: httpx.get(f"{server.url}/readyz").status_code == 200)
            os.kill(worker(server), signal.SIGKILL)
            until(lambda: engine(server)["restarts"] > number)  # noqa: B023 (called at once)
        assert httpx.get(f"{server.url}/livez").status_code == 200
        refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"})
        assert (refused.status_code, "Retry-After" in refused.headers) == (503, True)
        until(lambda: httpx.get(f"{server.url}/readyz").status_code == 200)
        assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_the_log_has_what_was_said_where_the_operator_asks(tmp_path: Path, stream: bool) -> None:
    with running(tmp_path, paced(step_ms=1), log={"texts": True}) as server:
        body = {"prompt": [PROMPT, "two"], "max_tokens": 3, "stream": stream}
        answer = httpx.post(f"{server.url}/v1/completions", json=body)
        assert server.terminate() == 0
    chunks = events_of(answer.text) if stream else [answer.json()]
    said = ["", ""]
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        said[choice["index"]] += choice["text"]
    [line] = [line for line in map(json.loads, server.log.read_text().splitlines()) if line["event"] == "request"]
    assert (line["prompts"], line["outputs"]) == ([PROMPT, "two"], said)
