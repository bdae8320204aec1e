"""The real process with the real model, through the clients that people use."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, Field

from tests.server.conftest import START_S, Server, running, spawn, write_config
from tests.sse import events_of

CHAT: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Name three colours."}]


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_chat_whole_and_streamed_say_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="smollm2", messages=CHAT, max_tokens=8, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model="smollm2",
            messages=CHAT,
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 8
    assert whole.usage.prompt_tokens > 20
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_completions_with_logprobs_and_a_list_of_prompts(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="smollm2", prompt=["One, two,", "The capital of France is"], max_tokens=2, temperature=0, logprobs=2, n=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[1].text.startswith(" Paris")
    logprobs = answer.choices[1].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.tokens[0] == " Paris"
    assert logprobs.token_logprobs is not None
    assert -5 < logprobs.token_logprobs[0] < 0


def test_a_structured_answer_is_parsed(client: openai.OpenAI) -> None:
    class Person(BaseModel):
        name: str = Field(max_length=20)
        age: int = Field(ge=0, le=130)

    answer = client.chat.completions.parse(
        model="smollm2",
        messages=[{"role": "user", "content": "A person, as JSON."}],
        response_format=Person,
        temperature=0,
        max_tokens=100,
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_models_and_an_unknown_one(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["smollm2"]
    with pytest.raises(openai.NotFoundError, match="available: 'smollm2'"):
        client.completions.create(model="gpt-4", prompt="x")


def test_a_prompt_longer_than_the_context(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="smollm2", prompt="word " * 600)
    assert refused.value.code == "context_length_exceeded"


def test_an_invalid_grammar(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="smollm2", prompt="x", extra_body={"grammar": "root ::= ("})
    assert refused.value.code == "invalid_grammar"


def test_tokens_there_and_back(server: Server) -> None:
    tokens = httpx.post(f"{server.url}/tokenize", json={"content": "Hé, herd"}).json()["tokens"]
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": tokens}).json() == {"content": "Hé, herd"}


def test_settings_change_while_it_runs(server: Server) -> None:
    before = httpx.get(f"{server.url}/admin/engine").json()
    changed = httpx.put(f"{server.url}/admin/engine", json={"parallel": 3, "ubatch": 64}, timeout=60).json()
    assert (changed["settings"]["parallel"], changed["settings"]["ubatch"]) == (3, 64)
    assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
    refused = httpx.put(f"{server.url}/admin/engine", json={"ubatch": 10_000})
    assert refused.json()["error"]["message"].startswith("ubatch 10000 is larger than batch")
    restored = httpx.put(f"{server.url}/admin/engine", json=before["settings"], timeout=60).json()
    assert restored["settings"] == before["settings"]
    assert restored["restarts"] == 0


def test_metrics_tell_of_the_engine(server: Server) -> None:
    httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 2})
    page = httpx.get(f"{server.url}/metrics").text
    values = {sample.name: sample.value for family in text_string_to_metric_families(page) for sample in family.samples}
    assert values["llamaherd_up"] == 1
    assert values["llamaherd_kv_cells"] == 2 * 512
    assert values["llamacpp:tokens_predicted_total"] >= 2
    assert values["llamaherd_step_decode_seconds_count"] >= 2
    assert values["llamaherd_step_overhead_seconds_sum"] > 0


def test_a_dead_worker_costs_its_requests_and_no_others(server: Server) -> None:
    body = {"prompt": "Count: 1, 2,", "max_tokens": 400, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as stream:
        pieces = stream.iter_text()
        begin = next(pieces)
        workers = subprocess.run(
            ["pgrep", "-P", str(server.process.pid), "-f", "llamaherd_server.worker"], capture_output=True, check=True
        )
        os.kill(int(workers.stdout), signal.SIGKILL)
        text = begin + "".join(pieces)
    assert events_of(text, done=False)[-1]["error"]["code"] == "engine_crashed"
    after = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 1}, timeout=60)
    assert after.status_code == 200
    assert httpx.get(f"{server.url}/admin/engine").json()["restarts"] == 1


def test_with_keys_it_drains_on_sigterm(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[[keys]]\nname = "team"\nsha256 = "{hashlib.sha256(b"secret").hexdigest()}"\n')
    with running(tmp_path, auth={"keys_file": keys}) as server:
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong").models.list()
        body = {"prompt": "Count: 1, 2,", "max_tokens": 30, "stream": True, "ignore_eos": True}
        headers = {"Authorization": "Bearer secret"}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=headers, timeout=60) as stream:
            pieces = stream.iter_text()
            begin = next(pieces)
            exit_code: list[int] = []
            waiting = threading.Thread(target=lambda: exit_code.append(server.terminate()))
            waiting.start()
            chunks = events_of(begin + "".join(pieces))
            assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        waiting.join()
    assert exit_code == [0]
    told = server.log.read_text()
    assert '"key":"team"' in told
    assert "secret" not in told
    assert "Count" not in told


def failed(process: subprocess.Popen[bytes], config: Path) -> str:
    """What a process that must fail had to say: one line."""
    assert process.wait(START_S) != 0
    told = config.with_name("server.log").read_text()
    assert told.count("\n") == 1, told
    return told


def test_a_taken_port_is_one_line_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = write_config(tmp_path, http={"port": port})
        assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in failed(spawn(config), config)


def test_a_model_that_is_no_gguf_is_one_line(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_text("not a model")
    config = write_config(tmp_path, model={"path": model})
    assert str(model) in failed(spawn(config), config)


def test_an_open_host_without_keys_is_refused(tmp_path: Path) -> None:
    config = write_config(tmp_path, http={"host": "0.0.0.0"})
    assert "set auth.keys_file" in failed(spawn(config), config)


def test_check_tells_whether_the_settings_are_right(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    assert spawn(config, "--check").wait(START_S) == 0
    assert "engine.kind" in failed(spawn(config, "--check", LLAMAHERD_ENGINE__KIND="other"), config)


def test_check_asks_llama_server_for_its_flags(tmp_path: Path) -> None:
    binary = Path(os.environ["LLAMAHERD_TEST_BIN_DIR"], "llama-server")
    older = tmp_path / "older"
    older.write_text(f"#!/bin/sh\n{binary} --help | grep -v kv-unified-per-slot\n")
    older.chmod(0o755)
    engine = {"kind": "llama-server", "binary": binary, "extra_args": ["--temp", "-1"]}
    assert spawn(write_config(tmp_path, engine=engine), "--check").wait(START_S) == 0
    config = write_config(tmp_path, engine=engine | {"extra_args": ["--no-such-flag=1"]})
    assert f"{binary} has no --no-such-flag" in failed(spawn(config, "--check"), config)
    config = write_config(tmp_path, engine=engine | {"binary": older})
    assert f"{older} has no --kv-unified-per-slot" in failed(spawn(config, "--check"), config)
