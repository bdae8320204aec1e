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
    assert line == f"{name} is no variable of llamaherd; did you mean {nearest}?"


@pytest.mark.parametrize("value", [{"parallel": 4, "kv_unified": False}, {}])
def test_right_values_pass(check_variables: ModuleType, value: Any) -> None:
    spec = check_variables.known_variables()["llamaherd_settings"]
    assert list(check_variables.mistakes("llamaherd_settings", value, spec)) == []
