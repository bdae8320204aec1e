"""Who may do what: keys, their reload, /admin, /metrics, ids of requests."""

from __future__ import annotations

import asyncio
import hashlib
import os

import httpx
import pytest

from llamaherd_server.config.keys import KeysError
from llamaherd_server.keyfile import revoke
from llamaherd_server.wire.engine_settings import EngineSettings

from .conftest import Serve, until
from .double import Double


def keys(**more: str) -> str:
    """A keys file with the secrets `user` and `root`; `more`: further lines of the user's key."""
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("user", "root")}
    user = [
        f'[[keys]]\nname = "user"\nsha256 = "{digests["user"]}"',
        *(f"{key} = {text}" for key, text in more.items()),
    ]
    return "\n".join([*user, f'[[keys]]\nname = "root"\nsha256 = "{digests["root"]}"\nadmin = true'])


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


@pytest.mark.parametrize("preemptible", [True, False])
async def test_what_a_key_may_be_preempted_for_reaches_the_engine(serve: Serve, *, preemptible: bool) -> None:
    double = Double()
    async with serve(double, keys(preemptible=str(preemptible).lower())) as served:
        await served.http.post("/v1/completions", json={"prompt": "x"}, headers=bearer("user"))
    assert [one.preemptible for one in double.seen] == [preemptible]


async def test_a_key_is_wanted_everywhere_but_at_the_probes(serve: Serve) -> None:
    async with serve(Double(), keys=keys()) as served:
        for path in ("/v1/models", "/nowhere", "/admin/engine"):
            reply = await served.http.get(path)
            assert (path, reply.status_code, reply.json()["error"]["code"]) == (path, 401, "invalid_api_key")
            assert reply.headers["WWW-Authenticate"] == "Bearer"
        for path in ("/livez", "/readyz", "/health", "/openapi.json", "/docs"):
            assert (await served.http.get(path)).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (bearer("user"), 200),
        ({"X-Api-Key": "user"}, 200),
        ({"Authorization": "bearer user"}, 200),
        (bearer("wrong"), 401),
        ({"Authorization": "user"}, 401),
    ],
)
async def test_a_key_comes_as_bearer_or_x_api_key(serve: Serve, headers: dict[str, str], status: int) -> None:
    async with serve(Double(), keys=keys()) as served:
        assert (await served.http.get("/v1/models", headers=headers)).status_code == status


async def test_admin_is_for_admin_keys(serve: Serve) -> None:
    async with serve(Double(), keys=keys()) as served:
        assert (await served.http.get("/admin/engine", headers=bearer("user"))).status_code == 403
        assert (await served.http.get("/admin/engine", headers=bearer("root"))).status_code == 200


async def test_without_keys_admin_is_for_this_machine(serve: Serve) -> None:
    async with serve(Double()) as served:
        assert (await served.http.get("/admin/engine")).status_code == 200
        proxied = await served.http.get("/admin/engine", headers={"X-Forwarded-For": "10.0.0.1"})
    assert proxied.status_code == 403


async def test_metrics_are_open_to_this_machine_but_not_through_a_proxy(serve: Serve) -> None:
    proxied = {"X-Forwarded-For": "10.0.0.1"}
    async with serve(Double(), keys=keys()) as served:
        assert (await served.http.get("/metrics")).status_code == 200
        assert (await served.http.get("/metrics", headers=proxied)).status_code == 401
        assert (await served.http.get("/metrics", headers=proxied | bearer("user"))).status_code == 200


async def test_keys_are_reloaded_when_their_file_changes(serve: Serve) -> None:
    async with serve(Double(), keys=keys()) as served:
        path = served.state.settings.auth.keys_file
        assert path is not None

        async def status() -> int:
            return (await served.http.get("/v1/models", headers=bearer("user"))).status_code

        assert await status() == 200
        path.write_text("half a fi")
        assert await status() == 200  # the old ones stay
        path.write_text(keys().replace(hashlib.sha256(b"user").hexdigest(), "0" * 64))
        assert await status() == 401


async def test_a_keys_file_swapped_in_place_with_its_old_time_is_read(serve: Serve) -> None:
    async with serve(Double(), keys=keys()) as served:
        path = served.state.settings.auth.keys_file
        assert path is not None
        before = path.stat()
        path.write_text(keys().replace(hashlib.sha256(b"user").hexdigest(), "0" * 64))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (path.stat().st_mtime_ns, path.stat().st_size) == (before.st_mtime_ns, before.st_size)
        assert (await served.http.get("/v1/models", headers=bearer("user"))).status_code == 401


async def test_a_queued_request_of_a_revoked_key_does_not_run(serve: Serve) -> None:
    double = Double(tokens=3, pace_s=0.1, settings=EngineSettings(parallel=1))
    async with serve(double, keys=keys()) as served:
        path = served.state.settings.auth.keys_file
        assert path is not None
        served.http.headers.update(bearer("user"))
        asked = [asyncio.create_task(served.chat()) for _ in range(6)]
        await until(lambda: served.state.serving.admission.queued > 0)
        revoke(path, "user")
        statuses = [(await reply).status_code for reply in asked]
    running = len(double.seen)
    assert sorted(statuses) == [200] * running + [401] * (6 - running)
    assert running < 6


@pytest.mark.parametrize(
    ("line", "status", "code"),
    [
        ({"expires": "2020-01-01T00:00:00Z"}, 401, "invalid_api_key"),
        ({"models": '["other"]'}, 403, "model_not_allowed"),
        ({"requests_per_minute": "1"}, 200, None),
    ],
)
async def test_a_key_has_limits_of_its_own(serve: Serve, line: dict[str, str], status: int, code: str | None) -> None:
    async with serve(Double(), keys=keys(**line)) as served:
        served.http.headers.update(bearer("user"))
        first = await served.chat()
        second = await served.chat()
    assert first.status_code == status
    if code:
        assert first.json()["error"]["code"] == code
    else:
        assert second.status_code == 429
        assert second.headers["Retry-After"] == "60"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[keys]]\nname = "a"\nsha256 = "12"', "64 lower-case hex digits"),
        ('[[keys]]\nname = "a"', "sha256"),
        (keys(colour="1"), "colour"),
        (keys(expires="2020-01-01T00:00:00"), "time zone"),
        (keys(priority="0.0"), "priority"),
        (keys() + "\n" + keys(), "same name"),
        ("", "keys"),
    ],
)
async def test_a_keys_file_with_a_mistake_stops_the_start(serve: Serve, text: str, message: str) -> None:
    with pytest.raises(KeysError, match=message):
        async with serve(Double(), keys=text):
            pass


async def test_a_request_keeps_a_wellformed_id(serve: Serve) -> None:
    async with serve(Double()) as served:

        async def returned(request_id: str) -> str:
            reply: httpx.Response = await served.http.get("/v1/models", headers={"X-Request-Id": request_id})
            return reply.headers["X-Request-Id"]

        assert await returned("trace-1.a:b") == "trace-1.a:b"
        assert await returned('"; drop') != '"; drop'


async def test_browsers_are_kept_out_unless_their_origin_is_named(serve: Serve) -> None:
    ask = {"Origin": "https://ui.example", "Access-Control-Request-Method": "POST"}
    async with serve(Double(), keys=keys()) as served:
        reply = await served.http.get("/v1/models", headers={**ask, **bearer("user")})
        assert "Access-Control-Allow-Origin" not in reply.headers
        assert (await served.http.options("/v1/chat/completions", headers=ask)).status_code == 400
        here = {**ask, "Origin": "http://localhost:3000"}
        allowed = await served.http.options("/v1/chat/completions", headers=here)
        assert (allowed.status_code, allowed.headers["Access-Control-Allow-Origin"]) == (200, here["Origin"])
    async with serve(Double(), keys=keys(), http={"cors_origins": ["https://ui.example"]}) as served:
        asked = await served.http.options("/v1/chat/completions", headers=ask)
        assert (asked.status_code, asked.headers["Access-Control-Allow-Origin"]) == (200, "https://ui.example")
        refused = await served.http.get("/v1/models", headers=ask)
        assert (refused.status_code, refused.headers["Access-Control-Allow-Origin"]) == (401, "https://ui.example")
        other = await served.http.get("/v1/models", headers={"Origin": "https://other.example"})
        assert "Access-Control-Allow-Origin" not in other.headers


async def test_a_request_may_not_have_more_generations_than_the_operator_allows(serve: Serve) -> None:
    async with serve(Double(), max_generations=2) as served:
        assert (await served.chat(n=2)).status_code == 200
        refused = await served.chat(n=3)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")


EVIL = {"Host": "evil.example:8080"}
PUT = {"parallel": 2}


async def test_without_keys_only_names_of_this_machine_are_answered(serve: Serve) -> None:
    async with serve(Double(), http={"allowed_hosts": ["gpu.example"]}) as served:
        for path in ("/", "/metrics", "/v1/models", "/admin/engine"):
            refused = await served.http.get(path, headers=EVIL)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "host_not_allowed")
            for host in ("localhost:8080", "127.0.0.1", "[::1]:8080", "a.localhost", "gpu.example"):
                assert (await served.http.get(path, headers={"Host": host})).status_code == 200
        assert (await served.http.put("/admin/engine", headers=EVIL, json=PUT)).status_code == 403
        assert (await served.http.get("/readyz", headers=EVIL)).status_code == 200


async def test_with_keys_an_unknown_host_needs_one_for_metrics(serve: Serve) -> None:
    async with serve(Double(), keys=keys()) as served:
        assert (await served.http.get("/metrics", headers=EVIL)).status_code == 401
        assert (await served.http.get("/", headers=EVIL)).status_code == 401
        assert (await served.http.get("/v1/models", headers=EVIL | bearer("user"))).status_code == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://evil.example", 403),
        ("null", 403),
        ("http://[", 403),
        ("https://ui.example", 200),
        ("http://localhost:3000", 200),
        ("http://127.0.0.1", 200),
    ],
)
async def test_without_keys_a_foreign_page_changes_nothing(serve: Serve, origin: str, status: int) -> None:
    async with serve(Double(), http={"cors_origins": ["https://ui.example"]}) as served:
        headers = {"Origin": origin}
        assert (await served.http.put("/admin/engine", headers=headers, json=PUT)).status_code == status
        completed = await served.http.post("/v1/completions", headers=headers, json={"prompt": "x"})
        assert completed.status_code == status
