"""Bad input: one line that names the value and the remedy."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

MODEL = {"name": "m", "sha256": "0" * 64, "source": {"kind": "https", "url": "https://models.internal/m.gguf"}}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("llamaherd_accelerator", "cdua", ["cdua", "auto, cpu, cuda, metal"]),
        ("llamaherd_install_packages", "false", ["true or false", "the string 'false'", "JSON"]),
        ("llamaherd_server_port", "8080", ["whole number", "'8080'"]),
        ("llamaherd_server_port", True, ["whole number", "True"]),
        ("llamaherd_keep_releases", 2.5, ["whole number", "2.5"]),
        ("llamaherd_settings", {"paralel": 4}, ["paralel", "did you mean parallel?"]),
        ("llamaherd_settings", {"parallel": "4"}, ["llamaherd_settings.parallel", "whole number"]),
        ("llamaherd_settings", {"kv_type_k": "q9"}, ["q9", "q8_0"]),
        ("llamaherd_settings", [4], ["a mapping"]),
        ("llamaherd_models", [MODEL | {"sha256": None}], ["llamaherd_models[0] (m) has no sha256"]),
        ("llamaherd_models", [MODEL | {"source": {"kind": "ftp"}}], ["ftp", "pypi, https, hf, file"]),
        ("llamaherd_nginx_exempt", [1], ["llamaherd_nginx_exempt[0]", "a string"]),
        ("llamaherd_models", None, ["llamaherd_models is null", "remove it"]),
        ("llamaherd_models", "m", ["llamaherd_models must be a list"]),
        ("llamaherd_models", [None], ["llamaherd_models[0] is null"]),
        ("llamaherd_models", [MODEL | {"lora": None}], ["llamaherd_models[0].lora is null"]),
        ("llamaherd_models", [MODEL | {"name": 7}], ["llamaherd_models[0].name must be a string"]),
        ("llamaherd_more_models", ["a", None], ["llamaherd_more_models[1] is null"]),
        ("llamaherd_server_port", 70000, ["llamaherd_server_port", "1 to 65535", "70000"]),
        ("llamaherd_nginx_port", 0, ["1 to 65535"]),
        ("llamaherd_instances", [{"name": "a", "port": 99999}], ["llamaherd_instances[0].port", "99999"]),
        ("llamaherd_keep_releases", -1, ["must not be below 0", "-1"]),
        ("llamaherd_server_nice", 20, ["-20 and 19"]),
        ("llamaherd_nginx_streams", 0, ["llamaherd_nginx_streams must be above 0"]),
        ("llamaherd_nginx_certificate_days", 10**12, ["between 1 and 36500"]),
        ("llamaherd_packages_wait_s", 10**12, ["llamaherd_packages_wait_s is too large"]),
        ("llamaherd_monitoring_ttft_p95_s", float("nan"), ["above 0, not nan"]),
        ("llamaherd_upgrade_least_speed", float("inf"), ["is too large: inf"]),
        ("llamaherd_secrets_dir", " ", ["llamaherd_secrets_dir is empty", "remove it"]),
        ("llamaherd_loadgen_space", ["parallel=4", ""], ["llamaherd_loadgen_space[1] is empty"]),
        ("llamaherd_bundle", "/srv/bundle\n", ["llamaherd_bundle has a line end"]),
        ("llamaherd_server_otlp_endpoint", "collector:4318", ["http or https URL", "'collector:4318'"]),
        ("llamaherd_server_otlp_endpoint", "grpc://collector:4317", ["such as http://collector.internal:4318"]),
        ("llamaherd_server_otlp_endpoint", "http://c:4318/v1/traces/", ["without user, query and /v1/traces"]),
        ("llamaherd_server_otlp_endpoint", "http://[fd00::1:4318", ["http or https URL"]),
        ("llamaherd_server_otlp_ratio", 1.5, ["between 0 and 1", "1.5"]),
        ("llamaherd_monitoring_error_ratio", 2, ["between 0 and 1"]),
        ("llamaherd_user", "Llama Herd", ["llamaherd_user", "small letters"]),
        ("llamaherd_prefix", "opt/llamaherd", ["llamaherd_prefix", "absolute", "'opt/llamaherd'"]),
        ("llamaherd_prefix", "/", ["of its own"]),
        ("llamaherd_state_dir", "/var/lib/", ["of its own", "reset.yml"]),
        ("llamaherd_state_dir", "/home/me", ["of its own"]),
        ("llamaherd_config_dir", "/etc/nginx", ["of its own"]),
        ("llamaherd_cache_dir", "/data/a;b", ["special characters"]),
        ("llamaherd_cache_dir", "/data/../etc", ["absolute"]),
        ("llamaherd_nginx_names", ["https://llm.internal"], ["llamaherd_nginx_names[0]", "without scheme"]),
        ("llamaherd_nginx_names", ["llm.internal", "10.0.0.999"], ["llamaherd_nginx_names[1]"]),
        ("llamaherd_nginx_names", ["a" * 64 + ".internal"], ["DNS name"]),
        ("llamaherd_nginx_names", ["bücher.example"], ["xn--"]),
        ("llamaherd_nginx_names", ["a; return 200"], ["DNS name"]),
        ("llamaherd_nginx_addresses", ["fd00::1"], ["brackets"]),
        ("llamaherd_nginx_exempt", ["10.0.0.0/33"], ["10.0.0.0/33", "a network"]),
        ("llamaherd_nginx_generate_rate", "20", ["20r/s"]),
        ("llamaherd_nginx_max_body", "4 MB", ["4m"]),
        ("llamaherd_nginx_read_timeout", "1 hour", ["60s"]),
        ("llamaherd_nginx_affinity_header", "X Session", ["letters"]),
        ("llamaherd_server_memory_max", "8 GB", ["8G"]),
        ("llamaherd_server_cpu_quota", "1.5", ["150%"]),
        ("llamaherd_llama_cpp_sha256", "", ["64"]),
        ("llamaherd_model_hf_url", "huggingface.co", ["http or https"]),
    ],
)
def test_a_wrong_value_is_one_line(check_variables: ModuleType, name: str, value: Any, expected: list[str]) -> None:
    found = list(check_variables.mistakes(name, value, check_variables.known_variables()[name]))
    assert len(found) == 1
    assert "\n" not in found[0]
    assert [words for words in expected if words not in found[0]] == []


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("llamaherd_acelerator", "llamaherd_accelerator"),
        ("llamaherd_nginx_prot", "llamaherd_nginx_port"),
        ("llamaherd_parallel", "llamaherd_settings.parallel"),
        ("llamaherd_ubatch_size", "llamaherd_settings.ubatch"),
    ],
)
def test_an_unknown_name_gets_the_nearest_right_one(check_variables: ModuleType, name: str, nearest: str) -> None:
    line = check_variables.unknown_variable(name, check_variables.known_variables())
    assert line == f"{name} is not a llamaherd variable; did you mean {nearest}?"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (
            "llamaherd_nginx_names",
            ["llm.internal", "*.example.com", "192.0.2.7", "fd00::1", "my_host", "xn--bcher-kva.de"],
        ),
        ("llamaherd_nginx_addresses", ["0.0.0.0", "[::]"]),
        ("llamaherd_nginx_exempt", ["10.0.0.0/8", "192.0.2.7", "fd00::/8", "10.1.2.3/8"]),
        ("llamaherd_nginx_read_timeout", "1h 30m"),
        ("llamaherd_nginx_light_rate", "30r/m"),
        ("llamaherd_server_memory_max", "infinity"),
        ("llamaherd_server_memory_max", "1.5G"),
        ("llamaherd_server_cpu_quota", ""),
        ("llamaherd_state_dir", "/srv/models"),
        ("llamaherd_state_dir", "/root/.cache/llamaherd/a b"),
        ("llamaherd_state_dir", "/data"),
        ("llamaherd_server_prompt_cache_dir", ""),
        ("llamaherd_server_nice", -5),
        ("llamaherd_upgrade_prompt", "Two\nlines."),
        ("llamaherd_model_hf_token", ""),
        ("llamaherd_server_host", "localhost"),
    ],
)
def test_other_right_values_pass(check_variables: ModuleType, name: str, value: Any) -> None:
    assert list(check_variables.mistakes(name, value, check_variables.known_variables()[name])) == []


def test_defaults_pass(check_variables: ModuleType) -> None:
    found = [
        line
        for name, spec in check_variables.known_variables().items()
        if not isinstance(default := spec.get("default"), str) or "{{" not in default
        if default is not None
        for line in check_variables.mistakes(name, default, spec)
    ]
    assert found == []


@pytest.mark.parametrize("value", [{"parallel": 4, "kv_unified": False}, {}])
def test_right_values_pass(check_variables: ModuleType, value: Any) -> None:
    spec = check_variables.known_variables()["llamaherd_settings"]
    assert list(check_variables.mistakes("llamaherd_settings", value, spec)) == []


def test_no_secret_is_told(check_variables: ModuleType) -> None:
    name = "llamaherd_model_hf_token"
    [line] = check_variables.mistakes(name, "hf_secret\n", check_variables.known_variables()[name])
    assert "hf_secret" not in line
