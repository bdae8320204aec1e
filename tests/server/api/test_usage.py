"""GET /v1/usage, budgets and the headers that tell of limits, over an engine double."""

from __future__ import annotations

import csv
import datetime
import io
import re
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from llamaherd_server.config.keys import Key, KeysError
from llamaherd_server.serving.quota import Quotas, duration

from .conftest import Serve
from .double import MODEL, Double
from .test_auth import bearer, keys

CHAT = {"messages": [{"role": "user", "content": "x"}]}
# Each with what the double tells of it: prompt, cached and completion tokens.
ASKED: list[tuple[str, dict[str, Any], tuple[int, int, int]]] = [
    ("/v1/chat/completions", CHAT, (5, 2, 3)),
    ("/v1/chat/completions", {**CHAT, "stream": True, "n": 2}, (5, 2, 6)),
    ("/v1/completions", {"prompt": ["x", "y"]}, (10, 4, 6)),
    ("/v1/messages", {"model": "double", "max_tokens": 1, **CHAT}, (5, 2, 1)),
    ("/v1/responses", {"input": "x"}, (5, 2, 3)),
    ("/v1/embeddings", {"input": ["x", "y"]}, (2, 0, 0)),
    ("/embedding", {"input": "x"}, (1, 0, 0)),
    ("/completion", {"prompt": "x"}, (5, 2, 3)),
]


def results(page: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for bucket in page["data"] for one in bucket["results"]]


@pytest.mark.parametrize(("path", "body", "tokens"), ASKED)
async def test_every_route_counts_and_tells_its_key(
    serve: Serve, path: str, body: dict[str, Any], tokens: tuple[int, int, int]
) -> None:
    today = datetime.datetime.now(datetime.UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    async with serve(Double(), keys=keys()) as served:
        assert (await served.http.post(path, json=body, headers=bearer("user"))).status_code == 200
        page = (await served.http.get("/v1/usage", headers=bearer("user"))).json()
        of_root = (await served.http.get("/v1/usage?key=root", headers=bearer("root"))).json()
    result = {
        "object": "organization.usage.completions.result",
        "api_key_id": "user",
        "model": "double",
        "num_model_requests": 1,
        "input_tokens": tokens[0],
        "input_cached_tokens": tokens[1],
        "output_tokens": tokens[2],
    }
    start = int(today.timestamp())
    bucket = {"object": "bucket", "start_time": start, "end_time": start + 86400, "results": [result]}
    assert page == {"object": "page", "data": [bucket], "has_more": False, "next_page": None}
    assert results(of_root) == []


async def test_a_rerank_counts(serve: Serve) -> None:
    async with serve(Double(model=msgspec.structs.replace(MODEL, pooling="rank"))) as served:
        body = {"query": "x", "documents": ["y", "z"]}
        answer = (await served.http.post("/v1/rerank", json=body)).json()
        (counted,) = results((await served.http.get("/v1/usage")).json())
    assert (counted["input_tokens"], counted["api_key_id"]) == (answer["usage"]["prompt_tokens"], "anonymous")


async def test_what_the_engine_has_not_taken_in_is_no_request(serve: Serve) -> None:
    async with serve(Double()) as served:
        assert (await served.chat(n=1000)).status_code == 400
        assert results((await served.http.get("/v1/usage")).json()) == []


async def test_an_admin_sees_all_and_chooses(serve: Serve) -> None:
    async with serve(Double(), keys=keys()) as served:
        for name in ("user", "root"):
            await served.http.post("/v1/completions", json={"prompt": "x"}, headers=bearer(name))

        async def found(query: str) -> list[str]:
            reply = await served.http.get(f"/v1/usage{query}", headers=bearer("root"))
            return [one["api_key_id"] for one in results(reply.json())]

        assert await found("") == ["root", "user"]
        assert await found("?key=user") == ["user"]
        assert await found("?model=double&from=2020-01-01&to=2999-12-31") == ["root", "user"]
        assert await found("?model=other") == await found("?to=2020-01-01") == await found("?from=2999-01-01") == []


async def test_csv(serve: Serve) -> None:
    async with serve(Double()) as served:
        await served.chat()
        by_query = await served.http.get("/v1/usage?format=csv")
        by_header = await served.http.get("/v1/usage", headers={"Accept": "text/csv"})
        json = await served.http.get("/v1/usage?format=json", headers={"Accept": "text/csv"})
    assert by_query.text == by_header.text
    assert by_query.headers["Content-Type"] == "text/csv; charset=utf-8"
    (row,) = csv.DictReader(io.StringIO(by_query.text))
    (result,) = results(json.json())
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    assert row == {"day": day} | {name: str(value) for name, value in result.items() if name != "object"}


@pytest.mark.parametrize(
    ("query", "status", "param", "said"),
    [
        ("from=2026-02-30", 400, "from", "day is out of range"),
        ("from=20260101", 400, "from", "2026-01-31"),
        ("to=tomorrow", 400, "to", "2026-01-31"),
        ("from=2026-02-01&to=2026-01-01", 400, None, "after"),
        ("format=xml", 400, "format", "csv"),
        ("colour=red", 400, "colour", "colour"),
        ("key=root", 403, "key", "not an admin key"),
    ],
)
async def test_bad_parameters_are_one_error(
    serve: Serve, query: str, status: int, param: str | None, said: str
) -> None:
    async with serve(Double(), keys=keys()) as served:
        reply = await served.http.get(f"/v1/usage?{query}", headers=bearer("user"))
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (status, param)
    assert said in error["message"]


async def test_usage_is_told_while_the_model_loads(serve: Serve) -> None:
    async with serve(Double(state="loading")) as served:
        assert (await served.http.get("/v1/models")).status_code == 503
        assert (await served.http.get("/v1/usage")).status_code == 200


BUDGETED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {**CHAT, "max_tokens": 40}),
    ("/v1/messages", {"model": "double", "max_tokens": 40, **CHAT}),
    ("/v1/responses", {"input": "x", "max_output_tokens": 40}),
    ("/completion", {"prompt": "x", "n_predict": 40}),
    ("/v1/embeddings", {"input": "x" * 60}),
]


@pytest.mark.parametrize(("path", "body"), BUDGETED)
async def test_a_budget_holds_at_every_route(serve: Serve, tmp_path: Path, path: str, body: dict[str, Any]) -> None:
    double = Double(tokens=40)
    async with serve(double, keys=keys(tokens_per_day="60"), usage_dir=tmp_path / "usage") as served:
        served.http.headers.update(bearer("user"))
        first = await served.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 40})
        second = await served.http.post(path, json=body)
    assert (first.status_code, second.status_code) == (200, 429)
    assert 0 < int(second.headers["Retry-After"]) <= 24 * 60 * 60
    assert second.headers["X-Should-Retry"] == "false"
    error = second.json()["error"]
    assert "45 of its 60 tokens per day" in error["message"]
    if path != "/v1/messages":
        assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_quota")


async def test_what_runs_has_its_part_of_the_budget_reserved(serve: Serve, tmp_path: Path) -> None:
    double = Double(tokens=10, pace_s=0.05)
    async with serve(double, keys=keys(tokens_per_month="100"), usage_dir=tmp_path / "usage") as served:
        served.http.headers.update(bearer("user"))
        body = {"prompt": "x", "max_tokens": 40, "stream": True}
        async with served.http.stream("POST", "/v1/completions", json=body) as one:
            assert one.status_code == 200
            async with served.http.stream("POST", "/v1/completions", json=body) as other:
                assert other.status_code == 200
                refused = await served.http.post("/v1/completions", json=body)
                await other.aread()
            await one.aread()
        after = await served.http.post("/v1/completions", json=body)
    assert (refused.status_code, after.status_code) == (429, 200)


async def test_budgets_need_a_place_to_be_kept(serve: Serve) -> None:
    with pytest.raises(KeysError, match=r"key 'user': tokens_per_day.*need limits\.usage_dir"):
        async with serve(Double(), keys=keys(tokens_per_day="60")):
            pass
    async with serve(Double(), keys=keys()) as served:
        path = served.state.settings.auth.keys_file
        assert path is not None
        path.write_text(keys(tokens_per_day="60"))
        assert (await served.http.get("/v1/models", headers=bearer("user"))).status_code == 200  # the old ones stay


@pytest.mark.parametrize("body", [{}, {"stream": True}])
async def test_answers_tell_what_is_left_of_limits(serve: Serve, body: dict[str, Any]) -> None:
    limits = {"requests_per_minute": "2", "tokens_per_minute": "600"}
    async with serve(Double(), keys=keys(**limits)) as served:
        served.http.headers.update(bearer("user"))
        replies: list[httpx.Response] = [await served.chat(max_tokens=100, **body) for _ in range(3)]
        of_root = await served.http.get("/v1/models", headers=bearer("root"))
    told = [reply.headers for reply in replies]
    assert [reply.status_code for reply in replies] == [200, 200, 429]
    assert [one["x-ratelimit-limit-requests"] for one in told] == ["2"] * 3
    assert [one["x-ratelimit-remaining-requests"] for one in told] == ["1", "0", "0"]
    assert [one["x-ratelimit-limit-tokens"] for one in told] == ["600"] * 3
    assert 400 < int(told[0]["x-ratelimit-remaining-tokens"]) < 600
    assert re.fullmatch(r"(1m)?\d+(\.\d+)?s", told[2]["x-ratelimit-reset-requests"])
    assert not [name for name in of_root.headers if "ratelimit" in name]


def test_the_reset_is_when_all_is_there_again() -> None:
    quotas = Quotas(clock=lambda: 0.0)
    key = Key(name="k", sha256="", tokens_per_minute=600, requests_per_minute=1e6)
    quotas.reserve(key, 150)
    assert quotas.headers(key) == {
        "X-RateLimit-Limit-Requests": "1000000",
        "X-RateLimit-Remaining-Requests": "1000000",
        "X-RateLimit-Reset-Requests": "0ms",
        "X-RateLimit-Limit-Tokens": "600",
        "X-RateLimit-Remaining-Tokens": "450",
        "X-RateLimit-Reset-Tokens": "15s",
    }
    quotas.settle(key, 150, 10000)
    assert quotas.headers(key)["X-RateLimit-Remaining-Tokens"] == "0"
    assert quotas.headers(key)["X-RateLimit-Reset-Tokens"] == "16m40s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0121, "13ms"), (1, "1s"), (7.66, "7.66s"), (59.9999, "1m0s"), (360, "6m0s"), (3723.5, "1h2m3.5s")],
)
def test_durations_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
