"""What a host of group chat gets beside the rest."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib

import pytest

from tests.roles.conftest import ROOT, Render, Rendered

CHAT = {"chat": {"hosts": {"debian12": None}}}


@pytest.fixture
def chat(render: Render) -> Rendered:
    return render("debian12", groups=CHAT, llamaherd_nginx_names=["chat.example.com", "2001:db8::1"])


def environment(rendered: Rendered) -> dict[str, str]:
    lines = rendered.text("open-webui.env").splitlines()
    return {name: json.loads(value) for name, _, value in (line.partition("=") for line in lines if line[0] != "#")}


def test_its_key_is_one_that_the_server_knows(chat: Rendered, debian: Rendered) -> None:
    keys = {key["name"]: key for key in tomllib.loads(chat.text("keys.toml"))["keys"]}
    key = environment(chat)["OPENAI_API_KEY"]
    assert keys["open-webui"]["sha256"] == hashlib.sha256(key.encode()).hexdigest()
    assert keys["open-webui"]["admin"] is False
    assert "open-webui" not in debian.text("keys.toml"), "no group chat"


def test_a_key_that_the_inventory_limits_is_not_given_twice(render: Render) -> None:
    limited = [{"name": "default"}, {"name": "admin", "admin": True}, {"name": "open-webui", "max_concurrent": 3}]
    keys = tomllib.loads(render("debian12", groups=CHAT, llamaherd_keys=limited).text("keys.toml"))["keys"]
    assert [key["max_concurrent"] for key in keys if key["name"] == "open-webui"] == [3]


def test_nginx_brings_people_to_it_and_its_questions_to_the_herd(chat: Rendered, debian: Rendered) -> None:
    config, found = chat.text("nginx.conf"), environment(chat)
    assert "listen 0.0.0.0:8444 ssl" in config
    assert set(re.findall(r"proxy_pass http://127.0.0.1:(\d+);", config)) == {"8090"}
    assert "--port 8090" in chat.text("llamaherd-open-webui.service")
    assert "listen 127.0.0.1:8091;" in config
    assert found["OPENAI_API_BASE_URL"] == "http://127.0.0.1:8091/v1"
    origins = found["CORS_ALLOW_ORIGIN"].split(";")
    assert {"https://debian12:8444", "https://chat.example.com:8444", "https://[2001:db8::1]:8444"} <= set(origins)
    assert "8444" not in debian.text("nginx.conf")


def test_the_inventory_has_the_last_word_on_its_settings(render: Render) -> None:
    found = environment(
        render("debian12", groups=CHAT, llamaherd_open_webui_environment={"ENABLE_TAGS_GENERATION": "true"})
    )
    assert found["ENABLE_TAGS_GENERATION"] == "true"
    assert found["USE_SLIM_DOCKER"] == "true"
    assert json.loads(found["DEFAULT_MODEL_METADATA"]) == {"capabilities": {"builtin_tools": False}}


def test_offline_is_held_by_systemd_too(render: Render, chat: Rendered) -> None:
    assert "IPAddressDeny=any" in chat.text("llamaherd-open-webui.service")
    online = render("debian12", groups=CHAT, llamaherd_open_webui_offline=False)
    assert "IPAddressDeny" not in online.text("llamaherd-open-webui.service")
    assert environment(online)["OFFLINE_MODE"] == "false"


def test_the_lock_leaves_out_what_slim_mode_does_without() -> None:
    folder = ROOT / "roles/open_webui/files"
    without = {
        line.split()[0] for line in (folder / "overrides.txt").read_text().splitlines() if not line.startswith("#")
    }
    locked = set(re.findall(r"^([\w.-]+)==", (folder / "requirements.lock").read_text(), re.MULTILINE))
    assert {"open-webui", "typer"} <= locked
    assert locked & (without | {"torch"}) == set()
