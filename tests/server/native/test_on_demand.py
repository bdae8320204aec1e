"""Models on demand behind one server, each on an engine of its own: one of them is in memory at a time."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ..conftest import Server, required, running
from .conftest import native

PROMPT = "The fleet of the harbour, told ship by ship and year by year. " * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demand")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    path, away = required("LLAMAHERD_TEST_MODEL"), {"residence": "on_demand"}
    broken = folder / "broken.gguf"
    broken.write_bytes(Path(path).read_bytes()[:200_000])
    (folder / "moved.gguf").symlink_to(path)
    models = [
        {"name": "resident", "path": path, "engine": {"parallel": 2}},
        {"name": "ours", "path": path, **away, "engine": {"parallel": 2}},
        {"name": "theirs", "path": path, **away, "engine": native(parallel=2)},
        {"name": "brief", "path": path, **away, "idle_s": 1, "engine": {"parallel": 2}},
        {"name": "moved", "path": str(folder / "moved.gguf"), **away, "engine": {"parallel": 2}},
        {"name": "broken", "path": str(broken), **away, "engine": {"parallel": 2}},
    ]
    with running(
        folder, models=models, limits={"prompt_cache_mib": 64, "prompt_cache_dir": str(folder / "p")}
    ) as started:
        yield started


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=400) as client:
        yield client


def ask(http: httpx.Client, model: str, **fields: Any) -> dict[str, Any]:
    answer = http.post("/v1/completions", json={"model": model, "prompt": "Hello", "max_tokens": 3, **fields})
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def figures(page: str, name: str) -> dict[str, float]:
    """A metric by model."""
    lines = [line for line in page.splitlines() if line.startswith(f"llamaherd_{name}{{")]
    return {line.split('"')[1]: float(line.split()[-1]) for line in lines}


def loaded(http: httpx.Client) -> set[str]:
    return {model for model, here in figures(http.get("/metrics").text, "loaded").items() if here}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert condition()


def test_what_nobody_asked_for_is_listed_and_ready_but_not_in_memory(http: httpx.Client) -> None:
    assert loaded(http) == {"resident"}
    assert http.get("/readyz").status_code == 200
    told = {model["id"]: model for model in http.get("/v1/models").json()["data"]}
    assert [*told] == ["resident", "ours", "theirs", "brief", "moved", "broken"]
    sizes = [told[name]["meta"]["n_params"] for name in ("resident", "ours", "theirs")]
    assert sizes == [sizes[0]] * 3
    assert figures(http.get("/metrics").text, "up") == dict.fromkeys(told, 1)
    for path in ("/slots", "/props", "/admin/engine"):
        assert http.get(path, params={"model": "theirs"}).status_code == 200
    assert loaded(http) == {"resident"}


def test_one_gives_way_to_the_other_and_its_prompts_survive(http: httpx.Client) -> None:
    for model in ("ours", "theirs", "ours"):
        answer = ask(http, model, prompt=PROMPT)
        assert loaded(http) == {"resident", model}
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= 0.9 * answer["usage"]["prompt_tokens"]


def test_what_is_idle_for_long_enough_goes(http: httpx.Client) -> None:
    ask(http, "brief")
    until(lambda: loaded(http) == {"resident"})
    loads = figures(http.get("/metrics").text, "loads_total")
    ask(http, "brief")
    assert figures(http.get("/metrics").text, "loads_total")["brief"] == loads["brief"] + 1


def test_one_that_cannot_be_loaded_takes_no_other_with_it(http: httpx.Client) -> None:
    for _ in range(2):
        answer = http.post("/v1/completions", json={"model": "broken", "prompt": "Hello"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_stopped")
        assert "'broken' could not be loaded" in answer.json()["error"]["message"]
    assert {model for model, up in figures(http.get("/metrics").text, "up").items() if not up} == {"broken"}
    assert http.get("/readyz").status_code == 200
    assert ask(http, "ours")["model"] == "ours"


def test_one_whose_file_is_gone_is_refused_until_it_is_back(folder: Path, http: httpx.Client) -> None:
    moved = folder / "moved.gguf"
    ask(http, "ours")
    moved.rename(folder / "elsewhere.gguf")
    answer = http.post("/v1/completions", json={"model": "moved", "prompt": "Hello"})
    assert answer.status_code == 503
    assert "'moved' could not be loaded" in answer.json()["error"]["message"]
    (folder / "elsewhere.gguf").rename(moved)
    until(lambda: http.post("/v1/completions", json={"model": "moved", "prompt": "Hello"}).status_code == 200)


def test_settings_are_changed_of_one_that_is_not_in_memory_and_stay(http: httpx.Client) -> None:
    ask(http, "theirs")
    http.put("/admin/engine", params={"model": "ours"}, json={"parallel": 3}).raise_for_status()
    ask(http, "theirs")
    assert http.get("/admin/engine", params={"model": "ours"}).json()["settings"]["parallel"] == 3
    ask(http, "ours")
    assert http.get("/admin/engine", params={"model": "ours"}).json()["settings"]["parallel"] == 3


async def test_nothing_is_lost_under_a_mixed_load(server: Server) -> None:
    dice = random.Random(7)
    async with httpx.AsyncClient(base_url=server.url, timeout=400) as http:

        async def one() -> str:
            await asyncio.sleep(dice.random() * 4)
            model = dice.choice(["resident", "ours", "theirs", "brief"])
            body = {"model": model, "prompt": "Hello", "max_tokens": 12, "stream": True, "ignore_eos": True}
            answer = await http.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
            assert not [event for event in events if "error" in event]
            finish: str = events[-1]["choices"][0]["finish_reason"]
            return finish

        async def watched() -> None:
            while True:
                page = (await http.get("/metrics")).text
                assert sum(figures(page, "loaded").values()) <= 2
                await asyncio.sleep(0.05)

        watching = asyncio.create_task(watched())
        assert await asyncio.gather(*(one() for _ in range(40))) == ["length"] * 40
        assert not watching.done()
        watching.cancel()
