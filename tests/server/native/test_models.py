"""Two models behind one server, each on an engine of its own."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from ..conftest import required, running
from .conftest import native


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    path = required("LLAMAHERD_TEST_MODEL")
    models = [
        {"name": "ours", "aliases": ["small", "default"], "path": path},
        {"name": "theirs", "path": path, "engine": native(parallel=3)},
    ]
    with (
        running(tmp_path_factory.mktemp("models"), models=models) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield client


@pytest.mark.parametrize(
    ("asked", "answers"), [("ours", "ours"), ("small", "ours"), ("theirs", "theirs"), (None, "ours")]
)
def test_a_request_goes_to_the_model_that_it_names(http: httpx.Client, asked: str | None, answers: str) -> None:
    body = {"prompt": "Hello", "max_tokens": 2, **({"model": asked} if asked else {})}
    before = generations(http, answers)
    answer = http.post("/v1/completions", json=body)
    assert answer.json()["model"] == answers
    assert generations(http, answers) == before + 1


def generations(http: httpx.Client, model: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    mine = (line for line in lines if line.startswith("llamaherd_generations_total") and f'model="{model}"' in line)
    return sum(float(line.split()[-1]) for line in mine)


def test_an_unknown_name_is_a_404_that_lists_what_there_is(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"model": "other", "prompt": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert "'ours', 'theirs'" in answer.json()["error"]["message"]


def test_all_are_listed(http: httpx.Client) -> None:
    listed = http.get("/v1/models").json()["data"]
    assert [(model["id"], model["aliases"]) for model in listed] == [("ours", ["small", "default"]), ("theirs", [])]


def test_each_has_its_engine_and_settings(http: httpx.Client) -> None:
    engines = {name: http.get("/admin/engine", params={"model": name}).json() for name in ("ours", "theirs")}
    assert {name: engine["engine"] for name, engine in engines.items()} == {
        "ours": "embedded",
        "theirs": "llama-server",
    }
    assert engines["theirs"]["settings"]["parallel"] == 3
    http.put("/admin/engine", params={"model": "ours"}, json={"parallel": 1}).raise_for_status()
    assert 'llamaherd_slots{model="ours"} 1.0' in http.get("/metrics").text
    assert 'llamaherd_slots{model="theirs"} 3.0' in http.get("/metrics").text


def test_llama_servers_own_routes_are_on_either_engine(http: httpx.Client) -> None:
    for model in ("theirs", "ours"):
        answer = http.post("/completion", json={"model": model, "prompt": "a", "n_predict": 1}).json()
        assert (answer["model"], answer["tokens_predicted"]) == (model, 1)
    assert len(http.get("/slots").json()) == 1
    assert http.get("/props").json()["model_alias"] == "ours"
