"""A key's own limits, with a clock of its own."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llamaherd_server.config.keys import ANONYMOUS, Key, Share
from llamaherd_server.config.share import part_of
from llamaherd_server.errors import ApiError
from llamaherd_server.serving.quota import CRASH_REFUSED_S, CRASH_WINDOW_S, CRASHES, SHARE_HEADER, Quotas

from .conftest import Serve
from .double import Double
from .test_auth import bearer, keys

CHAT = {"messages": [{"role": "user", "content": "x"}]}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_requests_per_minute_refill_evenly() -> None:
    clock = Clock()
    quotas = Quotas(clock=clock)
    key = Key(name="k", sha256="", requests_per_minute=2)
    for _ in range(2):
        with quotas.request(key):
            pass
    with pytest.raises(ApiError) as refused, quotas.request(key):
        pass
    assert (refused.value.status_code, (refused.value.headers or {})["Retry-After"]) == (429, "30")
    clock.now = 30
    with quotas.request(key):
        pass


@pytest.mark.parametrize("limit", [1, 2, 5, 9, 0.5, 7.25])
@pytest.mark.parametrize("servers", [1, 3, 8])
def test_parts_of_a_limit_are_together_the_limit(limit: float, servers: int) -> None:
    key = Key(name="k", sha256="", requests_per_minute=limit)
    shares = [Share(servers=servers, first=number) for number in range(servers)]
    parts = [part_of(share, 0, key) for share in shares]
    assert sum(part.requests(limit) for part in parts) == limit
    assert sum(part.tokens(limit) for part in parts) == pytest.approx(limit)
    assert sum(part.budget(limit) for part in parts) == pytest.approx(limit)


def test_servers_together_let_in_as_many_requests_as_the_key_may_have() -> None:
    clock = Clock()
    key = Key(name="k", sha256="", requests_per_minute=6, max_concurrent=3)
    shares = [partial(Share, servers=4, first=2 * host, here=2) for host in range(2)]
    servers = [Quotas(share, instance, clock) for share in shares for instance in range(2)]
    let_in = 0
    with ExitStack() as running:
        for quotas in servers * 2:
            try:
                running.enter_context(quotas.request(key))
                let_in += 1
            except ApiError as error:
                assert SHARE_HEADER in (error.headers or {})
        assert let_in == 3
    for quotas in servers * 3:
        with suppress(ApiError), quotas.request(key):
            let_in += 1
    assert let_in == 6


@pytest.mark.parametrize(("given", "sent"), [("@elsewhere_2", "@elsewhere_2"), ("/admin", None), (None, None)])
async def test_a_part_that_is_used_up_sends_the_edge_to_the_next_server(
    serve: Serve, given: str | None, sent: str | None
) -> None:
    asked = {"X-Llamaherd-Elsewhere": given} if given else {}
    async with serve(Double(), keys=keys(requests_per_minute="1")) as served:
        served.http.headers.update(bearer("user") | asked)
        replies = [await served.chat() for _ in range(2)]
    assert [reply.status_code for reply in replies] == [200, 429]
    assert [reply.headers.get("X-Accel-Redirect") for reply in replies] == [None, sent]
    assert SHARE_HEADER not in replies[1].headers


async def test_a_host_that_joins_takes_its_part_without_a_restart(serve: Serve, tmp_path: Path) -> None:
    text = keys(requests_per_minute="2")
    async with serve(Double(), keys=f"share = {{ servers = 1 }}\n{text}") as served:
        served.http.headers.update(bearer("user"))
        assert (await served.chat()).status_code == 200
        (tmp_path / "keys.toml").write_text(f"share = {{ servers = 2, first = 1 }}\n{text}")
        assert [(await served.chat()).status_code for _ in range(2)] == [200, 429]
        (tmp_path / "keys.toml").write_text(f"share = {{ servers = 2, first = 2 }}\n{text}")
        assert (await served.http.get("/v1/models")).status_code == 200, "one that is wrong leaves the former"


def test_tokens_are_reserved_and_settled() -> None:
    clock = Clock()
    quotas = Quotas(clock=clock)
    key = Key(name="k", sha256="", tokens_per_minute=60)
    quotas.reserve(key, 50)
    with pytest.raises(ApiError, match="60 tokens per minute: try again in 1 s"):
        quotas.reserve(key, 11)
    quotas.settle(key, 50, 90)
    with pytest.raises(ApiError, match="60 tokens per minute: try again in 31 s"):
        quotas.reserve(key, 0)
    clock.now = 31
    quotas.reserve(key, 1)


def test_a_request_larger_than_its_keys_minute_needs_a_full_account() -> None:
    clock = Clock()
    quotas = Quotas(clock=clock)
    key = Key(name="k", sha256="", tokens_per_minute=60)
    quotas.reserve(key, 600)
    with pytest.raises(ApiError, match="try again in 600 s"):
        quotas.reserve(key, 600)
    quotas.settle(key, 600, 0)
    quotas.reserve(key, 600)


def test_concurrent_requests_are_counted_out() -> None:
    quotas = Quotas(clock=Clock())
    key = Key(name="k", sha256="", max_concurrent=1)
    with quotas.request(key), pytest.raises(ApiError, match="1 concurrent requests"), quotas.request(key):
        pass
    with quotas.request(key):
        pass


def test_keys_do_not_share_an_account() -> None:
    quotas = Quotas(clock=Clock())
    keys = [Key(name=name, sha256="", requests_per_minute=1) for name in "ab"]
    for key in keys:
        with quotas.request(key):
            pass
    for key in keys:
        with pytest.raises(ApiError, match=f"key '{key.name}'"), quotas.request(key):
            pass


def test_a_key_at_whose_requests_the_engine_ends_again_and_again_is_refused_for_a_while() -> None:
    clock = Clock()
    quotas = Quotas(clock=clock)
    key, other = Key(name="k", sha256=""), Key(name="other", sha256="")
    for _ in range(CRASHES):
        with quotas.request(key):
            quotas.crashed(key)
    with quotas.request(other):
        pass
    with pytest.raises(ApiError, match="key 'k'") as refused, quotas.request(key):
        pass
    assert (refused.value.status_code, (refused.value.headers or {})["Retry-After"]) == (429, f"{CRASH_REFUSED_S:.0f}")
    clock.now = CRASH_REFUSED_S
    with quotas.request(key):
        pass


def test_crashes_that_lie_far_apart_refuse_nobody_nor_do_those_of_clients_without_a_key() -> None:
    clock = Clock()
    quotas = Quotas(clock=clock)
    key = Key(name="k", sha256="")
    for _ in range(3 * CRASHES):
        quotas.crashed(key)
        quotas.crashed(ANONYMOUS)
        clock.now += CRASH_WINDOW_S
        with quotas.request(key), quotas.request(ANONYMOUS):
            pass
    for _ in range(CRASHES):
        quotas.crashed(key)
        quotas.crashed(ANONYMOUS)
    with quotas.request(ANONYMOUS), pytest.raises(ApiError, match="key 'k'"), quotas.request(key):
        pass


ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/apply-template", CHAT),
    ("/v1/completions", {"prompt": "x"}),
    ("/v1/messages", {"model": "double", "max_tokens": 1, **CHAT}),
    ("/v1/messages/count_tokens", {"model": "double", **CHAT}),
    ("/v1/responses", {"input": "x"}),
    ("/v1/embeddings", {"input": "x"}),
    ("/v1/rerank", {"query": "x", "documents": ["y"]}),
    ("/tokenize", {"content": "x"}),
    ("/detokenize", {"tokens": [65]}),
    ("/completion", {"prompt": "x"}),
]


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize("headers", [{"Authorization": "bearer  user"}, {"X-Api-Key": "user"}])
async def test_every_route_counts_for_the_same_key(
    serve: Serve, path: str, body: dict[str, Any], headers: dict[str, str]
) -> None:
    async with serve(Double(), keys=keys(requests_per_minute="2")) as served:
        await served.http.post("/tokenize", json={"content": "x"}, headers=bearer("user"))
        first = await served.http.post(path, json=body, headers=headers)
        second = await served.http.post(path, json=body, headers=headers)
    assert first.status_code != 429
    assert (second.status_code, "2 requests per minute" in second.text) == (429, True)


@pytest.mark.parametrize(("path", "body"), ROUTES)
async def test_a_keys_models_hold_at_every_route(serve: Serve, path: str, body: dict[str, Any]) -> None:
    async with serve(Double(), keys=keys(models='["other"]')) as served:
        refused = await served.http.post(path, json=body, headers=bearer("user"))
    assert (refused.status_code, "may not use model 'double'" in refused.text) == (403, True)


async def test_a_burst_stays_within_the_tokens_of_a_minute(serve: Serve) -> None:
    double = Double(tokens=1, pace_s=0.05)
    async with serve(double, keys=keys(tokens_per_minute="100")) as served:
        served.http.headers.update(bearer("user"))
        body = {"prompt": "x" * 20, "max_tokens": 10}
        burst = await asyncio.gather(*(served.http.post("/v1/completions", json=body) for _ in range(64)))
    assert [reply.status_code for reply in burst].count(200) == 3
    assert len(double.seen) == 3
