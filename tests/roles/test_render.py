"""What the roles write, for every system they know."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import stat
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from llamaherd_server.config import keys as auth
from llamaherd_server.config import settings
from llamaherd_server.wire.engine_settings import EngineSettings
from tests.roles.conftest import ROOT, Render, Rendered


def test_the_server_accepts_its_settings(rendered: Rendered) -> None:
    found = settings.load(rendered.folder / "server.toml")
    assert found.engine.settings == EngineSettings()
    assert (found.http.host, found.http.port) == ("127.0.0.1", 8080)
    assert found.model.path == rendered.state_dir / "models/smollm2-135m-instruct.gguf"


def tuning(file: str, chosen: dict[str, Any]) -> dict[str, Any]:
    """What playbooks/tune.yml writes, measured on another build."""
    return {"measured_on": {"model": "m", "file": file, "build": "0-cpu"}, "settings": chosen, "provenance": {}}


def model_file(name: str) -> str:
    """The file of one of the models that the roles know: named after its content."""
    defaults = yaml.safe_load((ROOT / "roles/common/defaults/main.yml").read_text())
    return next(f"{model['sha256']}.gguf" for model in defaults["llamaherd_models"] if model["name"] == name)


def test_tuned_settings_go_before_the_operators(render: Render) -> None:
    found = render(
        "debian12",
        llamaherd_settings={"parallel": 8, "ctx_per_slot": 4096},
        llamaherd_tuned=[
            tuning("another-model.gguf", {"parallel": 7}),
            tuning(model_file("smollm2-135m-instruct"), {"parallel": 6, "flash_attention": "on"}),
        ],
        llamaherd_server_limits={"max_queue": 7},
    )
    loaded = settings.load(found.folder / "server.toml")
    assert loaded.engine.settings == EngineSettings(parallel=6, ctx_per_slot=4096, flash_attention="on")
    assert loaded.limits.max_queue == 7


def test_a_tuned_engine_goes_before_the_operators(render: Render) -> None:
    chosen = {"engine": "llama-server", "parallel": 6}
    found = render("debian12", llamaherd_tuned=[tuning(model_file("smollm2-135m-instruct"), chosen)])
    loaded = settings.load(found.folder / "server.toml")
    assert (loaded.engine.kind, loaded.engine.settings) == ("llama-server", EngineSettings(parallel=6))


def test_settings_tuned_for_another_model_are_kept_and_not_used(render: Render) -> None:
    found = render("debian12", llamaherd_tuned=[tuning("another-model.gguf", {"parallel": 7})])
    assert settings.load(found.folder / "server.toml").engine.settings == EngineSettings()


def test_the_host_gets_hashes_and_the_controller_keeps_keys(rendered: Rendered) -> None:
    keys = tomllib.loads(rendered.text("keys.toml"))["keys"]
    assert [(key["name"], key["admin"]) for key in keys] == [("default", False), ("admin", True)]
    for key in keys:
        secret = rendered.secrets_dir / "keys" / key["name"]
        assert key["sha256"] == hashlib.sha256(secret.read_text().strip().encode()).hexdigest()
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600


def test_a_keys_limits_reach_the_server(render: Render) -> None:
    limits = {"requests_per_minute": 60, "max_concurrent": 2, "models": ["m"], "expires": "2099-01-31T00:00:00Z"}
    limits |= {"tokens_per_day": 10**6, "tokens_per_month": 2 * 10**7}
    found = render("debian12", llamaherd_keys=[{"name": "team", "priority": 0.5, **limits}])
    [key] = auth.read_keys(found.folder / "keys.toml").keys
    assert (key.name, key.requests_per_minute, key.max_concurrent, key.models) == ("team", 60, 2, ["m"])
    assert (key.tokens_per_day, key.tokens_per_month) == (10**6, 2 * 10**7)
    assert (key.priority, key.expires) == (0.5, datetime.datetime(2099, 1, 31, tzinfo=datetime.UTC))


@pytest.mark.parametrize(("edges", "servers"), [({"debian12": None}, 3), ({}, 1)])
def test_a_server_gets_its_part_of_a_fleets_limits(render: Render, edges: dict[str, None], servers: int) -> None:
    hosts = {"another": {"llamaherd_instances": [{"name": "two", "port": 8082}]}, "debian12": {}}
    found = render("debian12", groups={"inference": {"hosts": hosts}, "edge": {"hosts": edges}})
    share = auth.read_keys(found.folder / "keys.toml").share
    assert (share.servers, share.first, share.here) == (servers, servers - 1, 1)


@pytest.mark.parametrize(
    "changed",
    [
        {"llamaherd_llama_cpp_native": False},
        {"llamaherd_llama_cpp_cmake_flags": ["-DGGML_BLAS=ON"]},
        {"llamaherd_llama_cpp_version": "0.3.37"},
        {"llamaherd_llama_cpp_targets": ["llama-server"]},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_changed_flag_is_another_release(render: Render, debian: Rendered, changed: dict[str, object]) -> None:
    assert render("debian12", **changed).decided["build_key"] != debian.decided["build_key"]


def test_a_shared_release_fits_every_host_of_its_kind(render: Render) -> None:
    hosts = ("rocky9", "rhel9", "debian12")
    one, other, newer = (render(host, llamaherd_llama_cpp_strategy="shared").decided for host in hosts)
    assert {"-DGGML_NATIVE=OFF", "-DGGML_BACKEND_DL=ON", "-DGGML_CPU_ALL_VARIANTS=ON"} <= set(one["flags"])
    assert one["build_key"] == other["build_key"], "the distribution does not matter"
    assert one["build_key"] != newer["build_key"], "the C library does"
    cuda = render("cuda", llamaherd_llama_cpp_strategy="shared").decided
    assert "-DCMAKE_CUDA_ARCHITECTURES=90-real" in cuda["flags"]
    assert cuda["build_key"] != one["build_key"]


def test_what_does_not_matter_to_a_build_is_the_same_release(render: Render, debian: Rendered) -> None:
    same = render("debian12", llamaherd_llama_cpp_jobs=1, llamaherd_settings={"parallel": 2})
    assert same.decided["build_key"] == debian.decided["build_key"]


@pytest.mark.parametrize(
    ("started", "found"), [("2020-01-01 00:00:00.5 UTC", True), ("2100-01-01", False), ("", False)]
)
def test_a_server_that_is_older_than_its_files_is_found(
    debian: Rendered, tmp_path: Path, started: str, found: bool
) -> None:
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(f"#!/bin/sh\necho '{started}'\n")
    systemctl.chmod(0o755)
    command = ["sh", "-c", debian.decided["newer_files"]]
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    newer = subprocess.run(command, capture_output=True, text=True, check=True, env=path).stdout.split()
    expected = {debian.folder / "server.toml", debian.state_dir / "models/smollm2-135m-instruct.gguf"}
    assert set(map(Path, newer)) & expected == (expected if found else set())
    assert found or not newer


def test_nginx_errors_are_openais(debian: Rendered) -> None:
    bodies = re.findall(r"return (\d+) '(\{.*\})';", debian.text("nginx.conf"))
    assert {int(status) for status, _ in bodies} == {400, 404, 413, 429, 500, 503}
    for _, body in bodies:
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_nginx_zones_are_in_http_and_streams_are_not_buffered(debian: Rendered) -> None:
    config = debian.text("nginx.conf")
    before_server = config[: config.index("\n    server {")]
    assert before_server.count("limit_req_zone ") == config.count("limit_req_zone ") == 3
    assert "proxy_buffering off;" in config


def test_exempt_addresses_reach_nginx(render: Render) -> None:
    config = render("debian12", llamaherd_nginx_exempt=["10.20.0.0/16"]).text("nginx.conf")
    assert re.search(r"geo \$llamaherd_exempt \{\s+default 0;\s+10\.20\.0\.0/16 1;\s+\}", config)


def test_what_is_a_models_own_reaches_the_server(render: Render, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    source = {"kind": "https", "url": "https://example.com/model.gguf"}
    lora = {"name": "tone", "sha256": "b" * 64, "source": source, "scale": 0.5}
    own = {"settings": {"ctx_per_slot": 1024}, "engine": "llama-server", "chat_template": str(template), "lora": [lora]}
    own["chat_template_kwargs"] = {"enable_thinking": False, "reasoning_effort": "low"}
    own["sampling"] = {"temperature": 0.6, "top_k": 20, "max_tokens": 512}
    model = {"name": "smollm2-135m-instruct", "sha256": "a" * 64, "source": source, **own}
    found = render("debian12", llamaherd_models=[model], llamaherd_settings={"parallel": 2, "ctx_per_slot": 4096})
    store = found.state_dir / "models"
    expected = store / f"{hashlib.sha256(template.read_bytes()).hexdigest()[:12]}.jinja"
    for path in (expected, store / f"{'b' * 64}.gguf"):
        path.touch()
    loaded = settings.load(found.folder / "server.toml")
    assert loaded.engine.kind == "llama-server"
    assert loaded.engine.settings == EngineSettings(parallel=2, ctx_per_slot=1024)
    assert loaded.model.chat_template == expected
    assert loaded.model.chat_template_kwargs == {"enable_thinking": False, "reasoning_effort": "low"}
    assert loaded.model.sampling == {"temperature": 0.6, "top_k": 20, "max_tokens": 512}
    assert [(one.path, one.scale) for one in loaded.model.lora] == [(store / f"{'b' * 64}.gguf", 0.5)]


def test_the_native_engine_is_one_variable(render: Render) -> None:
    found = render("debian12", llamaherd_engine="llama-server")
    assert "client_max_body_size 4m;" in found.text("nginx.conf")
    loaded = settings.load(found.folder / "server.toml")
    assert loaded.engine.kind == "llama-server"
    assert loaded.model.aliases == ["*"]


def test_several_models_are_one_servers(render: Render) -> None:
    source = {"kind": "file", "path": "/m.gguf"}
    entries: list[dict[str, Any]] = [
        {"name": "chat", "aliases": ["default"], "draft": "half", "settings": {"parallel": 2, "speculative": "draft"}},
        {
            "name": "see",
            "engine": "llama-server",
            "mmproj": "eye",
            "draft": "half",
            "gpu_layers": 7,
            "memory_share": 0.25,
        },
        {
            "name": "find",
            "engine": "llama-server",
            "extra_args": ["--embeddings", "--pooling", "mean"],
            "residence": "on_demand",
            "idle_s": 60,
        },
        {"name": "eye"},
        {"name": "half"},
    ]
    found = render(
        "debian12",
        llamaherd_models=[{**one, "sha256": "0" * 64, "source": source} for one in entries],
        llamaherd_more_models=["see", "find"],
        llamaherd_settings={"parallel": 6, "batch": 256, "ubatch": 128},
        llamaherd_server_limits={"models_loaded": 2},
    )
    assert settings.load(found.folder / "server.toml").limits.models_loaded == 2
    chat, see, find = settings.load(found.folder / "server.toml").models
    assert (see.aliases, find.aliases) == ([], [])
    assert (chat.name, chat.aliases, chat.placement.gpu_layers) == ("chat", ["default"], -1)
    assert (chat.engine.kind, chat.engine.settings.parallel, chat.engine.settings.batch) == ("embedded", 2, 256)
    assert (see.engine.kind, see.engine.settings.parallel, see.placement.gpu_layers) == ("llama-server", 6, 7)
    assert see.mmproj == found.state_dir / "models/eye.gguf"
    assert chat.draft == see.draft == found.state_dir / "models/half.gguf"
    assert (chat.engine.settings.speculative, see.engine.settings.speculative) == ("draft", "off")
    assert find.engine.extra_args == ["--embeddings", "--pooling", "mean"]
    assert [(one.residence, one.idle_s) for one in (see, find)] == [("resident", 600), ("on_demand", 60)]
    assert "client_max_body_size 32m;" in found.text("nginx.conf"), "for images"


def test_an_upgrade_brings_all_models_and_what_is_their_own(render: Render, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    source = {"kind": "file", "path": "/m.gguf"}
    lora = {"name": "tone", "sha256": "c" * 64, "source": source}
    names = ("chat", "see", "eye", "unused")
    models: list[dict[str, Any]] = [
        {"name": name, "sha256": f"{number}" * 64, "source": source} for number, name in enumerate(names)
    ]
    models[1] |= {"engine": "llama-server", "mmproj": "eye", "lora": [lora], "chat_template": str(template)}
    found = []
    for text in ("{{ messages }}", "{{ messages[0] }}"):
        template.write_text(text)
        version = {"llamaherd_environment": {"TEMPLATE": text}}  # a render of its own
        found.append(render("debian12", llamaherd_models=models, llamaherd_more_models=["see"], **version))
    decided = found[0].decided
    links = {Path(link).name: target for link, target in decided["upgrade"]}
    assert links == {f"{name}.gguf": f"{number}" * 64 + ".gguf" for number, name in enumerate(names[:3])}
    assert decided["upgrade_settings"] == found[0].text("server.toml"), "as deploy writes them"
    assert f"{'c' * 64}.gguf" in decided["upgrade_settings"]
    other = found[1].decided["upgrade_settings"].replace(str(found[1].folder.parent), str(found[0].folder.parent))
    assert other != decided["upgrade_settings"], "another chat template"


ALLOWED = re.compile(r"^IPAddressAllow=(\S+)$", re.MULTILINE)


def test_a_model_is_spread_over_workers(render: Render, debian: Rendered) -> None:
    worker = {"hosts": {"w1": {"llamaherd_rpc_address": "10.0.0.3", "llamaherd_rpc_port": 50053}}}
    own = {"llamaherd_rpc_workers": ["w1"], "llamaherd_rpc_address": "10.0.0.2", "llamaherd_engine": "llama-server"}
    found = render("debian12", groups={"rpc": worker}, **own)
    assert settings.load(found.folder / "server.toml").engine.rpc == ["10.0.0.3:50053"]
    assert "-DGGML_RPC=ON" in found.decided["flags"]
    assert "-DGGML_RPC=ON" not in debian.decided["flags"]
    assert ALLOWED.findall(found.text("llamaherd-server.service")) == ["localhost", "10.0.0.3"]


@pytest.mark.parametrize(
    ("endpoint", "reached"),
    [
        ("http://localhost:4318", ["localhost"]),
        ("http://127.0.0.1:4318", ["localhost"]),
        ("http://10.0.0.9:4318/", ["localhost", "10.0.0.9"]),
        ("https://[fd00::9]:4318", ["localhost", "fd00::9"]),
        ("https://collector.internal/otlp", []),  # a name may stand for any address, and needs one that knows it
    ],
)
def test_the_unit_reaches_the_collector_of_traces(
    render: Render, debian: Rendered, tmp_path: Path, endpoint: str, reached: list[str]
) -> None:
    token = tmp_path / "token"
    token.write_text("Authorization: Bearer sesame\n")
    names = {"endpoint": endpoint, "headers_file": str(token), "ratio": 0.25}
    found = render("debian12", **{f"llamaherd_server_otlp_{name}": value for name, value in names.items()})
    (found.folder / "otlp-headers").touch()
    telemetry = settings.load(found.folder / "server.toml").telemetry
    assert (telemetry.otlp_endpoint, telemetry.otlp_ratio) == (endpoint.rstrip("/"), 0.25)
    assert telemetry.otlp_headers_file == found.folder / "otlp-headers"
    assert found.decided["server_lock"] == "requirements-telemetry.lock"
    assert str(found.folder / "otlp-headers") in found.decided["newer_files"]
    for unit in ("llamaherd-server.service", "llamaherd-server-container.service"):
        assert ALLOWED.findall(found.text(unit)) == reached
        assert ("IPAddressDeny=any\n" in found.text(unit)) == bool(reached)
    assert debian.decided["server_lock"] == "requirements.lock"
    assert "telemetry" not in debian.text("server.toml")


def test_a_worker_lets_in_who_names_it(render: Render) -> None:
    names = {"llamaherd_rpc_workers": ["debian12"], "llamaherd_rpc_address": "10.0.0.2"}
    groups = {"inference": {"hosts": {"big": names, "other": None}}, "rpc": {"hosts": {"debian12": None}}}
    found = render("debian12", groups=groups, llamaherd_rpc_address="10.0.0.3")
    unit = found.text("llamaherd-rpc.service")
    assert "/bin/ggml-rpc-server --host 10.0.0.3 --port 50052\n" in unit
    assert "IPAddressDeny=any\n" in unit
    assert ALLOWED.findall(unit) == ["10.0.0.2"]
    assert "-DGGML_RPC=ON" in found.decided["flags"]


def test_instances_are_balanced_over(render: Render) -> None:
    more = {"name": "gpu1", "port": 8082, "devices": "1", "settings": {"parallel": 2}}
    found = render("cuda", llamaherd_server_devices="0", llamaherd_instances=[more])
    upstream = found.text("nginx.conf").split("upstream inference {")[1].split("}")[0]
    assert re.findall(r"server (127\S+) ", upstream) == ["127.0.0.1:8080", "127.0.0.1:8082"]


def test_kv_types_are_tried_only_where_that_was_said(render: Render, debian: Rendered) -> None:
    space = {"llamaherd_loadgen_space": ["kv_type_k=f16,q8_0"]}
    assert "--quality" not in debian.decided["tuner"]
    subject = f"--subject=debian12 {model_file('smollm2-135m-instruct')} "
    assert any(option.startswith(subject) for option in debian.decided["tuner"]), "what a journal resumes for"
    opened = render("debian12", llamaherd_loadgen_quality=True, **space).decided["tuner"]
    assert opened[-2:] == ["--space=kv_type_k=f16,q8_0", "--quality"]


def test_hosts_of_loadgen_but_the_controller_are_workers(render: Render) -> None:
    hosts = {"load1": None, "here": {"ansible_connection": "local"}, "load2": None}
    one = render("debian12", groups={"loadgen": {"hosts": {"here": hosts["here"]}}}).decided
    assert one["workers"] == []
    more = {"llamaherd_loadgen_processes": 3, "llamaherd_loadgen_workload": "tests/lab/brief.yml"}
    decided = render("debian12", groups={"loadgen": {"hosts": hosts}}, **more).decided
    assert decided["workers"] == ["load1", "load2"]
    assert {"--master-bind-host=127.0.0.1", "--master-bind-port=4444", "--expect-workers=6"} <= set(decided["master"])
    run = "/opt/llamaherd/loadgen/run"
    said = {
        f"--workload={run}/brief.yml",
        f"--ca={run}/ca.crt",
        f"--key-file={run}/key",
        "--processes=3",
        "--master-port=4444",
    }
    assert said <= set(decided["worker"])
    assert {key: Path(file).name for key, file in decided["worker_files"].items()} == {
        f"{run}/key": "default",
        f"{run}/ca.crt": "ca.crt",
        f"{run}/brief.yml": "brief.yml",
    }
