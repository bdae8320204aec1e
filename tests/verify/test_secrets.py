"""Secrets: who may read what, on the host and here."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host


def test_the_host_has_hashes_that_only_the_server_reads(host: Host, promised: dict[str, Any]) -> None:
    if not promised["inference"]:
        pytest.skip("not an inference host")
    keys = host.file(f"{promised['config_dir']}/keys.toml")
    assert keys.mode == 0o640
    assert (keys.user, keys.group) == ("root", promised["group"])
    for key in Path(promised["keys_dir"]).iterdir():
        assert key.read_text().strip() not in keys.content_string


def test_settings_are_not_for_everyone(host: Host, promised: dict[str, Any]) -> None:
    if not promised["inference"]:
        pytest.skip("not an inference host")
    assert host.file(f"{promised['config_dir']}/server.toml").mode == 0o640


def test_the_collectors_token_is_for_the_server_alone(host: Host, promised: dict[str, Any]) -> None:
    headers = host.file(f"{promised['config_dir']}/otlp-headers")
    if headers.exists:
        assert (headers.user, headers.group, headers.mode) == ("root", promised["group"], 0o640)


def test_nginx_key_is_for_root_alone(host: Host, promised: dict[str, Any]) -> None:
    if not promised["edge"]:
        pytest.skip("not an edge host")
    keys = host.check_output("grep -Po '(?<=ssl_certificate_key )/etc/nginx[^;]+' /etc/nginx/nginx.conf").split()
    assert keys
    for path in keys:
        assert (host.file(path).user, host.file(path).mode) == ("root", 0o600)


def test_secrets_here_are_for_their_owner_alone(host: Host, promised: dict[str, Any]) -> None:
    keys = list(Path(promised["keys_dir"]).iterdir()) + list(Path(promised["keys_dir"]).parent.glob("**/*.key"))
    assert keys
    for key in keys:
        assert stat.S_IMODE(key.stat().st_mode) == 0o600, key
