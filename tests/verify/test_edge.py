"""nginx before clients: TLS, what is public, and limits."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from testinfra.host import Host

from tests.verify.client import Client


@pytest.fixture(autouse=True)
def _edge(promised: dict[str, Any]) -> Iterator[None]:
    if not promised["edge"]:
        pytest.skip("not an edge host")
    yield


def test_nginx_runs_now_and_at_boot(host: Host) -> None:
    nginx = host.service("nginx")
    assert nginx.is_running
    assert nginx.is_enabled


def test_nginx_accepts_its_configuration(host: Host) -> None:
    tested = host.run("nginx -t")
    assert tested.rc == 0, tested.stderr


def test_tls_is_verified_against_the_ca(host: Host, client: Client) -> None:
    connection = client.connect()
    connection.connect()
    connection.close()


def test_tls_fails_without_the_ca(host: Host, client: Client) -> None:
    if not client.ca:
        pytest.skip("the certificate is one that everybody trusts")
    with pytest.raises(ssl.SSLCertVerificationError):
        client.connect(ssl.create_default_context()).connect()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_tls_is_refused(host: Host, client: Client) -> None:
    context = ssl.create_default_context(cafile=client.ca)
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("DEFAULT@SECLEVEL=0")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        client.connect(context).connect()


@pytest.mark.parametrize("path", ["/metrics", "/admin/engine", "/docs", "/openapi.json", "/"])
def test_what_operators_use_is_not_public(host: Host, client: Client, path: str) -> None:
    answer = client.request("GET", path)
    assert answer.status == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_headers_tell_browsers_to_stay_with_https(host: Host, client: Client) -> None:
    headers = client.request("GET", "/livez").headers
    assert "max-age=" in headers["Strict-Transport-Security"]
    assert headers["Server"] == "nginx"


def test_beyond_the_limit_is_429_as_openai_says_it(host: Host, client: Client, promised: dict[str, Any]) -> None:
    if promised["exempt"]:
        pytest.skip("llamaherd_nginx_exempt lifts the limits for some addresses, perhaps this one")
    with ThreadPoolExecutor(4) as pool:
        bursts = pool.map(lambda _: client.burst("/v1/models", promised["light_burst"] + 10), range(4))
        answers = [answer for burst in bursts for answer in burst]
    refused = [answer for answer in answers if answer.status == 429]
    assert {answer.status for answer in answers} == {200, 429}
    assert int(refused[0].headers["Retry-After"]) >= 1
    error = refused[0].json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == "rate_limit_exceeded"
