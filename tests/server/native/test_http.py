"""Our API and llama-server's own, over the real llama-server with the real model."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.sse import events_of

from ..conftest import Server, running
from .conftest import native

ASK = {"messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 8, "temperature": 0}


def ready(http: httpx.Client) -> None:
    deadline = time.monotonic() + 60
    while http.get("/readyz").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def pid(http: httpx.Client) -> int:
    """Of the llama-server, which is the only child of the front end that is called so."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, status = (folder / "comm").read_text().strip(), (folder / "status").read_text()
        except OSError:
            continue
        if name == "llama-server" and f"PPid:\t{http.headers['X-Test-Parent']}\n" in status:
            return int(folder.name)
    pytest.fail("there is no llama-server")


def test_a_chat_and_its_stream_say_the_same(http: httpx.Client) -> None:
    whole = http.post("/v1/chat/completions", json=ASK).json()
    chunks = events_of(http.post("/v1/chat/completions", json={**ASK, "stream": True}).text)
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"] != ""
    assert whole["usage"]["completion_tokens"] <= 8
    assert whole["usage"]["prompt_tokens"] > 0


def test_completions_honour_stop_bias_and_logprobs(http: httpx.Client) -> None:
    body = {"prompt": "1, 2, 3, 4,", "max_tokens": 12, "temperature": 0, "logprobs": 2}
    choice = http.post("/v1/completions", json={**body, "stop": ["6"]}).json()["choices"][0]
    assert choice["text"].strip() == "5,"
    assert choice["finish_reason"] == "stop"
    assert len(choice["logprobs"]["top_logprobs"][0]) == 2
    [token] = http.post("/tokenize", json={"content": " dog"}).json()["tokens"]
    biased = http.post("/v1/completions", json={"prompt": "The", "max_tokens": 3, "logit_bias": {str(token): 100}})
    assert biased.json()["choices"][0]["text"] == " dog dog dog"


def test_structured_output_is_enforced(http: httpx.Client) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {**schema, "additionalProperties": False}}}
    answer = http.post("/v1/chat/completions", json={**ASK, "max_tokens": 40, "response_format": form}).json()
    assert isinstance(json.loads(answer["choices"][0]["message"]["content"])["a"], bool)


def test_a_mistake_is_the_clients(http: httpx.Client) -> None:
    long = http.post("/v1/completions", json={"prompt": "a " * 2000})
    assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
    grammar = http.post("/v1/completions", json={"prompt": "a", "grammar": "root ::= ("})
    assert (grammar.status_code, grammar.json()["error"]["code"]) == (400, "invalid_grammar")


def test_tokens_go_there_and_back(http: httpx.Client) -> None:
    tokens = http.post("/tokenize", json={"content": "hello wörld"}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": tokens}).json()["content"] == "hello wörld"
    pieces = http.post("/tokenize", json={"content": "x媽", "with_pieces": True}).json()["tokens"]
    parts = [one["piece"].encode() if isinstance(one["piece"], str) else bytes(one["piece"]) for one in pieces]
    assert b"".join(parts) == "x媽".encode()
    assert list in {type(one["piece"]) for one in pieces}  # bytes of what is no character by itself


def test_embeddings(http: httpx.Client) -> None:
    answer = http.post("/v1/embeddings", json={"input": ["a cat", "a dog"]}).json()
    assert [len(one["embedding"]) for one in answer["data"]] == [576, 576]
    assert sum(value**2 for value in answer["data"][0]["embedding"]) == pytest.approx(1, abs=1e-3)
    assert answer["usage"]["prompt_tokens"] > 2


def test_its_own_completion_is_passed_on_and_counted(http: httpx.Client) -> None:
    before = http.get("/metrics").text
    body = {"prompt": "Hello", "n_predict": 4, "temperature": 0}
    whole = http.post("/completion", json=body).json()
    chunks = events_of(http.post("/completion", json={**body, "stream": True}).text, done=False)
    assert "".join(chunk["content"] for chunk in chunks) == whole["content"]
    assert chunks[-1]["stop_type"] == "limit"
    assert whole["model"] == chunks[-1]["model"] == "smollm2"
    assert counted(http.get("/metrics").text) - counted(before) == 8


def test_more_prompts_than_there_are_slots_are_answered(http: httpx.Client) -> None:
    before = http.get("/metrics").text
    prompts = ["One", "Two", "Three", "Four", "Five", "Six"]
    body = {"prompt": prompts, "n_predict": 2, "temperature": 0}
    assert [one["index"] for one in http.post("/completion", json=body).json()] == [0, 1, 2, 3, 4, 5]
    streamed = events_of(http.post("/completion", json={**body, "stream": True}).text, done=False)
    assert {one["index"] for one in streamed if one} == {0, 1, 2, 3, 4, 5}  # llama-server has events that are null
    assert counted(http.get("/metrics").text) - counted(before) == 24


def counted(page: str) -> float:
    return float(page.split("\nllamacpp:tokens_predicted_total ")[1].split("\n", maxsplit=1)[0])


def test_infill_tells_what_the_model_lacks(http: httpx.Client) -> None:
    answer = http.post("/infill", json={"input_prefix": "a", "input_suffix": "b"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported")


def test_what_it_cannot_read_is_the_clients_mistake(http: httpx.Client) -> None:
    for prompt in ({"prompt_string": "a", "multimodal_data": ["AAAA"]}, [], {"a": 1}, [1, 10**6]):
        assert http.post("/completion", json={"prompt": prompt, "n_predict": 1}).status_code == 400
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    answer = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": [part]}]})
    assert (answer.status_code, "mmproj" in answer.json()["error"]["message"]) == (400, True)


def test_a_chat_that_speaks_of_media_is_a_chat(http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": 'What is "image_url"?'}], "max_tokens": 2, "tool_choice": "none"}
    answer = http.post("/v1/chat/completions", json={**body, "metadata": {"image_url": "input_audio"}}).json()
    assert answer["model"] == "smollm2"
    assert http.post("/v1/chat/completions", json={**body, "temperatur": 1}).status_code == 400


def test_a_line_end_of_unicode_does_not_cut_an_event(http: httpx.Client) -> None:
    grammar = 'root ::= "a\\u2028b\\x85c"'
    body = {"prompt": "x", "grammar": grammar, "max_tokens": 30}
    assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == "a\u2028b\x85c"
    chunks = events_of(http.post("/completion", json={**body, "stream": True}).text, done=False)
    assert "".join(chunk["content"] for chunk in chunks) == "a\u2028b\x85c"


def test_props_and_slots_tell_no_text(http: httpx.Client) -> None:
    http.post("/completion", json={"prompt": "a secret word", "n_predict": 1})
    props, slots = http.get("/props").json(), http.get("/slots")
    assert (props["total_slots"], props["model_alias"]) == (2, "smollm2")
    assert [slot["is_processing"] for slot in slots.json()] == [False, False]
    assert "secret" not in slots.text


def test_other_settings_come_into_force_by_a_restart(tmp_path: Path) -> None:
    with running(tmp_path, engine=native()) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        put = http.put("/admin/engine", json={"parallel": 3, "ctx_per_slot": 256})
        assert put.json()["settings"]["parallel"] == 3
        assert len(http.get("/slots").json()) == 3
        assert http.post("/v1/chat/completions", json=ASK).status_code == 200


def test_what_ran_fails_cleanly_and_what_comes_next_is_served(tmp_path: Path) -> None:
    with running(tmp_path, engine=native()) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        http.headers["X-Test-Parent"] = str(server.process.pid)
        long = {**ASK, "max_tokens": 400, "stream": True, "ignore_eos": True}
        got: list[str] = []
        begun = threading.Event()

        def run() -> None:
            with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=long, timeout=60) as response:
                for text in response.iter_text():
                    begun.set()
                    got.append(text)

        thread = threading.Thread(target=run)
        thread.start()
        assert begun.wait(60)
        os.kill(pid(http), signal.SIGKILL)
        thread.join(60)
        assert events_of("".join(got), done=False)[-1]["error"]["code"] == "engine_crashed"
        assert http.post("/v1/chat/completions", json=ASK).status_code == 200
        ready(http)
        assert http.get("/admin/engine").json()["restarts"] == 1


def test_nothing_is_left_after_the_front_end_was_killed(tmp_path: Path) -> None:
    with running(tmp_path, engine=native()) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        http.headers["X-Test-Parent"] = str(server.process.pid)
        child = Path(f"/proc/{pid(http)}")
        server.process.kill()
        server.process.wait()
        deadline = time.monotonic() + 30
        while child.exists() and "State:\tZ" not in (child / "status").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_the_key_is_not_among_the_arguments(server: Server, http: httpx.Client) -> None:
    http.headers["X-Test-Parent"] = str(server.process.pid)
    process = Path(f"/proc/{pid(http)}")
    environment = dict(pair.split("=", 1) for pair in (process / "environ").read_text().split("\0") if "=" in pair)
    assert environment["LLAMA_API_KEY"] not in (process / "cmdline").read_text()


def test_the_binarys_defaults_and_the_models_are_for_what_a_request_leaves_out(tmp_path: Path) -> None:
    engine = native(extra_args=["--seed", "7", "--n-predict", "3"])
    with running(tmp_path, engine=engine, model={"sampling": {"temperature": 0}}) as server:
        http = httpx.Client(base_url=server.url, timeout=60)
        props = http.get("/props").json()["default_generation_settings"]["params"]
        chat = http.post("/v1/chat/completions", json={"messages": ASK["messages"], "verbose": True}).json()
        own = http.post("/completion", json={"prompt": "x", "top_k": 9, "stop": None}).json()
    for settings in (props, chat["__verbose"]["generation_settings"], own["generation_settings"]):
        assert (settings["seed"], settings["temperature"]) == (7, 0)
    assert (chat["usage"]["completion_tokens"], own["tokens_predicted"]) == (3, 3)


def test_log_probabilities_of_given_texts_are_refused(http: httpx.Client) -> None:
    error = http.post("/admin/logprobs", json={"inputs": [{"prompt": "a b"}]}).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported", "engine")
    assert "llama-server returns no log probabilities of given texts: use engine embedded" in error["message"]
