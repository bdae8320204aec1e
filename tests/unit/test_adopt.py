"""An existing llama-server unit, read as llamaherd's variables."""

from __future__ import annotations

import json
import shlex
from types import ModuleType
from typing import Any

import pytest

# What `busctl` says of such a unit as tests/lab/test_spine.py has: quoted and continued lines, a template, a drop-in.
ARGUMENTS = shlex.split(
    "/opt/llama.cpp/llama-server --model 'models/My Model qwen.gguf' --host 0.0.0.0 --port='${PORT}' -c 8192 -np 4"
    " -ngl 99 -fa '$EXTRA' --cache-type-v=q8_0 --seed -1 --mlock"
)
ENVIRONMENT = ["LLAMA_ARG_THREADS=3", "LLAMA_API_KEY=sk-secret", "LLAMA_ARG_CTX_SIZE=512"]
FILE = """\
# left by a package
PORT=8081
EXTRA="-b 1024 -ub 256 --alias='Qwen 7B, qwen'"
LLAMA_ARG_CACHE_TYPE_K=q8_0
LLAMA_ARG_THREADS = 6
NOTE=it's a note
"""


def told(arguments: list[str], environment: list[str] | None = None, folder: str = "") -> list[str]:
    """The lines of `busctl --json=short get-property`."""
    run = [[arguments[0], arguments, False, 0, 0, 0, 0, 0, 0, 0]]
    return [json.dumps({"type": "…", "data": data}) for data in (run, environment or [], folder)]


def test_flags_become_variables(llama_server_filters: ModuleType) -> None:
    adopted = llama_server_filters.adopt_llama_server(told(ARGUMENTS, ENVIRONMENT, "/var/lib/llama"), [FILE])
    left = {item["flag"]: item["reason"] for item in adopted.pop("left")}
    assert adopted == {
        "path": "/var/lib/llama/models/My Model qwen.gguf",
        "parts": ["/var/lib/llama/models/My Model qwen.gguf"],
        "hub": "",
        "mmproj": "",
        "chat_template": "",
        "lora": [],
        "name": "my-model-qwen",
        "aliases": ["Qwen 7B", "qwen"],
        "port": 8081,
        "gpu_layers": 99,
        "ctx_size": 8192,
        "parallel": 4,
        "settings": {
            "batch": 1024,
            "ubatch": 256,
            "kv_type_k": "q8_0",
            "kv_type_v": "q8_0",
            "flash_attention": "on",
            "threads": 6,
        },
        "placement": {"load_mode": "mmap+mlock"},
    }
    assert set(left) == {"--host", "--seed", "LLAMA_API_KEY"}
    assert left["--seed"] == "not taken over: was -1"
    assert "sk-secret" not in str(left)


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        (
            ["/usr/bin/llama-server", "-m", "/m.gguf", "-fa", "auto", "-no-kvu"],
            {"flash_attention": "auto", "kv_unified": False},
        ),
        (["/usr/bin/llama-server", "-m", "/m.gguf", "-kvu", "-fa"], {"flash_attention": "on", "kv_unified": True}),
        (["/usr/bin/llama-server", "-m", "/m.gguf", "--spec-type", "ngram-mod"], {"speculative": "ngram"}),
        (["/usr/bin/numactl", "-m", "0", "/opt/llama-server", "-m", "/m.gguf", "-tb", "2"], {"threads_batch": 2}),
        (["/bin/bash", "-c", "exec ./llama-server -m '/m.gguf' -t 2"], {"threads": 2}),
        (["/bin/sh", "-c", "ulimit -l unlimited; /opt/llama-server -m /m.gguf -ub 64"], {"ubatch": 64}),
        (["/opt/build/bin/server", "-m", "/m.gguf", "-b", "32"], {"batch": 32}),
    ],
    ids=[
        "switches",
        "bare switches",
        "n-grams",
        "behind another program",
        "shell",
        "script",
        "another name",
    ],
)
def test_ways_to_say_it(llama_server_filters: ModuleType, arguments: list[str], settings: dict[str, Any]) -> None:
    adopted = llama_server_filters.adopt_llama_server(told(arguments))
    assert (adopted["path"], adopted["settings"]) == ("/m.gguf", settings)
    assert adopted["left"] == []


def test_what_a_model_has_beside_its_weights_is_taken_over(llama_server_filters: ModuleType) -> None:
    loras = ["--lora", "a.gguf,/b/b.gguf", "--lora=c.gguf", "--lora-scaled", "d.gguf:0.5"]
    arguments = ["llama-server", "-m", "m.gguf", *loras, "-mm", "eye.gguf", "--chat-template-file", "/chat.jinja"]
    adopted = llama_server_filters.adopt_llama_server(told(arguments, folder="/srv"))
    assert adopted["left"] == []
    assert (adopted["mmproj"], adopted["chat_template"]) == ("/srv/eye.gguf", "/chat.jinja")
    assert [(one["name"], one["path"], one["scale"]) for one in adopted["lora"]] == [
        ("a", "/srv/a.gguf", 1),
        ("b", "/b/b.gguf", 1),
        ("c", "/srv/c.gguf", 1),
        ("d", "/srv/d.gguf", 0.5),
    ]
    unclear = llama_server_filters.adopt_llama_server(told(["llama-server", "-m", "/m", "--lora-scaled", "d.gguf"]))
    assert unclear["left"] == [{"flag": "--lora-scaled", "reason": "d.gguf is not understood"}]


def test_where_weights_are_is_taken_over(llama_server_filters: ModuleType) -> None:
    flags = "-ncmoe 12 -dev CUDA1,CUDA0 -sm row -ts 3,1.5 -mg 1 --numa distribute --no-mmap".split()  # noqa: SIM905 (as one writes it)
    adopted = llama_server_filters.adopt_llama_server(told(["llama-server", "-m", "/m.gguf", *flags]))
    assert adopted["left"] == []
    assert adopted["placement"] == {
        "cpu_moe_layers": 12,
        "devices": ["CUDA1", "CUDA0"],
        "split_mode": "row",
        "tensor_split": [3.0, 1.5],
        "main_gpu": 1,
        "numa": "distribute",
        "load_mode": "none",
    }
    adopted = llama_server_filters.adopt_llama_server(told(["llama-server", "-m", "/m.gguf", "-cmoe", "--mlock"]))
    assert adopted["placement"] == {"cpu_moe_layers": 512, "load_mode": "mmap+mlock"}


def test_what_is_no_number_is_told_and_not_guessed(llama_server_filters: ModuleType) -> None:
    adopted = llama_server_filters.adopt_llama_server(
        told(["llama-server", "-m", "/m.gguf", "-t", "many", "-hft", "hf_secret", "--spec-type", "draft-mtp"])
    )
    assert adopted["settings"] == {}
    assert adopted["left"] == [
        {"flag": "-t", "reason": "many is not understood"},
        {"flag": "--spec-type", "reason": "draft-mtp is not understood"},
        {"flag": "-hft", "reason": "a token is not read out"},
    ]


def test_a_model_of_the_hub_is_told(llama_server_filters: ModuleType) -> None:
    adopted = llama_server_filters.adopt_llama_server(
        told(["llama-server", "-hf", "ggml-org/gemma-3-4b-it-GGUF:Q4_K_M"])
    )
    assert (adopted["path"], adopted["hub"]) == ("", "ggml-org/gemma-3-4b-it-GGUF:Q4_K_M")


def test_a_split_model_is_all_its_parts_under_one_name(llama_server_filters: ModuleType) -> None:
    adopted = llama_server_filters.adopt_llama_server(told(["llama-server", "-m", "/m/Big-00001-of-00003.gguf"]))
    assert adopted["name"] == "big"
    assert adopted["parts"] == [f"/m/Big-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
