"""Filter that converts the flags of a llama-server unit to llamaherd's variables."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from ansible_collections.llamaherd.llamaherd.plugins.module_utils import gguf

# All spellings, from llama-server --help, of flags that have a variable here. Flags override environment variables.
_MODEL = ("-m", "--model", "LLAMA_ARG_MODEL")
_HUB = ("-hf", "-hfr", "--hf-repo", "LLAMA_ARG_HF_REPO")
_ALIAS = ("-a", "--alias", "LLAMA_ARG_ALIAS")
_CONTEXT = ("-c", "--ctx-size", "LLAMA_ARG_CTX_SIZE")
_PARALLEL = ("-np", "--parallel", "LLAMA_ARG_N_PARALLEL")
_PORT = ("--port", "LLAMA_ARG_PORT")
_GPU_LAYERS = ("-ngl", "--gpu-layers", "--n-gpu-layers", "LLAMA_ARG_N_GPU_LAYERS")
_WORDS = {
    "": "on",
    "1": "on",
    "true": "on",
    "enabled": "on",
    "0": "off",
    "false": "off",
    "disabled": "off",
    "-1": "auto",
}
_SPECULATIVE = {"none": "off", "ngram": "ngram"}
_SETTINGS: dict[str, tuple[tuple[str, ...], Callable[[str], Any]]] = {
    "batch": (("-b", "--batch-size", "LLAMA_ARG_BATCH"), int),
    "ubatch": (("-ub", "--ubatch-size", "LLAMA_ARG_UBATCH"), int),
    "kv_type_k": (("-ctk", "--cache-type-k", "LLAMA_ARG_CACHE_TYPE_K"), str),
    "kv_type_v": (("-ctv", "--cache-type-v", "LLAMA_ARG_CACHE_TYPE_V"), str),
    # Without a value it means on, as in builds before September 2025.
    "flash_attention": (("-fa", "--flash-attn", "LLAMA_ARG_FLASH_ATTN"), lambda word: _WORDS.get(word, word)),
    "threads": (("-t", "--threads", "LLAMA_ARG_THREADS"), int),
    "threads_batch": (("-tb", "--threads-batch"), int),
    "speculative": (("--spec-type", "LLAMA_ARG_SPEC_TYPE"), lambda types: _SPECULATIVE[types.split("-")[0]]),
    "kv_unified": (("-kvu", "--kv-unified", "LLAMA_ARG_KV_UNIFIED"), lambda word: _WORDS.get(word, word) == "on"),
}
_PLACEMENT: dict[str, tuple[tuple[str, ...], Callable[[str], Any]]] = {
    "cpu_moe_layers": (("-ncmoe", "--n-cpu-moe", "LLAMA_ARG_N_CPU_MOE"), int),
    "devices": (("-dev", "--device", "LLAMA_ARG_DEVICE"), lambda word: word.split(",")),
    "split_mode": (("-sm", "--split-mode", "LLAMA_ARG_SPLIT_MODE"), str),
    "tensor_split": (
        ("-ts", "--tensor-split", "LLAMA_ARG_TENSOR_SPLIT"),
        lambda word: [float(share) for share in word.split(",")],
    ),
    "main_gpu": (("-mg", "--main-gpu", "LLAMA_ARG_MAIN_GPU"), int),
    "load_mode": (("-lm", "--load-mode", "LLAMA_ARG_LOAD_MODE"), str),
    "numa": (("--numa", "LLAMA_ARG_NUMA"), str),
}
# --load-mode has replaced these flags.
_MLOCK = ("--mlock", "LLAMA_ARG_MLOCK")
_NO_MMAP = ("--no-mmap", "LLAMA_ARG_NO_MMAP")
_ALL_LAYERS = 512  # LLAMA_MAX_LAYERS
_CPU_MOE = ("-cmoe", "--cpu-moe", "LLAMA_ARG_CPU_MOE")
_MMPROJ = ("-mm", "--mmproj", "LLAMA_ARG_MMPROJ")
_CHAT_TEMPLATE = ("--chat-template-file", "LLAMA_ARG_CHAT_TEMPLATE_FILE")
# Both can be repeated, and each can list several adapters.
_LORA = "--lora"
_LORA_SCALED = "--lora-scaled"
_NOT_UNIFIED = ("-no-kvu", "--no-kv-unified")
# Flags for what llamaherd always does or does differently.
_COVERED = {
    **dict.fromkeys(("--host", "LLAMA_ARG_HOST"), "nginx listens, the server stays on loopback"),
    **dict.fromkeys(
        ("--api-key", "LLAMA_API_KEY", "--api-key-file"),
        "llamaherd_keys: new keys, named and hashed; what there was is not taken over",
    ),
    **dict.fromkeys(("-hft", "--hf-token"), "a token is not read out"),
    **dict.fromkeys(("--ssl-key-file", "--ssl-cert-file"), "nginx has a certificate of its own"),
    **dict.fromkeys(("-cb", "--cont-batching", "--metrics", "LLAMA_ARG_ENDPOINT_METRICS", "--jinja"), "always on"),
}


def adopt_llama_server(service: Sequence[str], environment_files: Sequence[str] = ()) -> dict[str, Any]:
    """Convert a service's ExecStart, Environment, WorkingDirectory and environment files to llamaherd's variables.

    `service` has one line for each property, as `busctl --json=short get-property` prints them; systemd has already
    resolved drop-ins, continued lines, quotes and specifiers. Returns path (the GGUF, or ""), parts (paths of all its
    files), hub (the value of -hf), mmproj and chat_template (paths, or ""), lora (name, path and scale of each), name,
    aliases, port, gpu_layers, settings and placement (only what the unit sets), ctx_size and parallel as llama-server
    counts them (0: not set), and left (flag and reason for each flag that was not converted).
    """
    commands, assignments, folder = (json.loads(line)["data"] for line in service)
    environment = {name: value for name, _equals, value in (each.partition("=") for each in assignments)}
    for text in environment_files:
        environment |= _assignments(text.replace("\\\n", "").splitlines())
    words = list(_expanded(commands[-1][1] if commands else [], environment))
    flags = {name: value for name, value in environment.items() if name.startswith("LLAMA_")}
    for flag, value in _flags(words):
        repeated = flag in (_LORA, _LORA_SCALED) and flag in flags
        flags[flag] = f"{flags[flag]},{value}" if repeated else value
    unclear: dict[str, str] = {}

    def take(names: tuple[str, ...], kind: Callable[[str], Any], default: Any) -> Any:
        found = [(name, flags.pop(name)) for name in names if name in flags]
        try:
            return kind(found[0][1]) if found else default
        except (ValueError, KeyError):
            unclear[found[0][0]] = f"{found[0][1] or 'nothing'} is not understood"
            return default

    def located(name: str) -> str:
        return str(PurePosixPath(folder.removeprefix("!") or "/", name))

    path = take(_MODEL, located, "")
    adopted: dict[str, Any] = {
        "path": path,
        "parts": gguf.part_names(path),
        "hub": take(_HUB, str, ""),
        "mmproj": take(_MMPROJ, located, ""),
        "chat_template": take(_CHAT_TEMPLATE, located, ""),
        "lora": [
            {"name": PurePosixPath(file).name.removesuffix(".gguf"), "path": located(file), "scale": scale}
            for file, scale in [*take((_LORA,), _loras, []), *take((_LORA_SCALED,), _scaled_loras, [])]
        ],
        "name": re.sub(r"[^\w.-]+", "-", re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", PurePosixPath(path).name).lower()),
        "aliases": take(_ALIAS, lambda names: [name.strip() for name in names.split(",")], []),
        "port": take(_PORT, int, 8080),
        "gpu_layers": take(_GPU_LAYERS, _layers, -1),
        "ctx_size": take(_CONTEXT, int, 0),
        "parallel": take(_PARALLEL, int, 0),
        "settings": {},
        "placement": {},
    }
    for placed, (names, kind) in _PLACEMENT.items():
        if (value := take(names, kind, None)) is not None:
            adopted["placement"][placed] = value
    if take(_CPU_MOE, str, None) is not None:
        adopted["placement"]["cpu_moe_layers"] = _ALL_LAYERS
    locks, unmapped = take(_MLOCK, str, None) is not None, take(_NO_MMAP, str, None) is not None
    if locks or unmapped:
        adopted["placement"].setdefault("load_mode", ("mlock" if unmapped else "mmap+mlock") if locks else "none")
    for setting, (names, kind) in _SETTINGS.items():
        if (value := take(names, kind, None)) is not None:
            adopted["settings"][setting] = value
    if take(_NOT_UNIFIED, str, None) is not None:
        adopted["settings"]["kv_unified"] = False
    left = {
        flag: _COVERED.get(flag, f"not taken over{f': was {value}' if value else ''}") for flag, value in flags.items()
    }
    adopted["left"] = [{"flag": flag, "reason": reason} for flag, reason in (unclear | left).items()]
    return adopted


def _layers(word: str) -> int | str:
    """Return the number of layers, `auto`, or -1 for all."""
    return word if word == "auto" else int(word) if word.isdigit() else -1


def _loras(value: str) -> list[tuple[str, float]]:
    return [(file, 1.0) for file in next(csv.reader([value]))]


def _scaled_loras(value: str) -> list[tuple[str, float]]:
    """Return path and scale of each adapter in FNAME:SCALE,…. Raises ValueError if a scale is missing."""
    pairs = [item.rpartition(":") for item in next(csv.reader([value]))]
    return [(file, float(scale)) for file, _colon, scale in pairs]


def _assignments(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield name and value of each line NAME=value, parsed like an EnvironmentFile in systemd.exec(5)."""
    for line in map(str.strip, lines):
        name, equals, value = line.partition("=")
        if equals and not line.startswith(("#", ";")):
            try:
                yield name.strip(), " ".join(shlex.split(value))
            except ValueError:  # an unmatched quote is literal
                yield name.strip(), value


def _expanded(words: Sequence[str], environment: Mapping[str, str]) -> Iterator[str]:
    """Yield words with $NAME and ${NAME} expanded as in systemd.service(5), and each word of a `sh -c` script."""
    for number, word in enumerate(words):
        if number and words[number - 1] in ("-c", "-lc") and PurePosixPath(words[0]).name in ("sh", "bash", "dash"):
            yield from _expanded(shlex.split(word), environment)
        elif re.fullmatch(r"\$\w+", word):
            yield from shlex.split(environment.get(word[1:], ""))
        else:
            yield re.sub(r"\$\{(\w+)\}", lambda name: environment.get(name[1], ""), word).replace("$$", "$")


def _flags(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each flag after llama-server with its value. Other programs, such as numactl, may precede llama-server."""
    programs = [number for number, word in enumerate(words) if PurePosixPath(word).name == "llama-server"]
    words = words[programs[0] + 1 if programs else 1 :]
    for number, word in enumerate(words):
        if not word.startswith("-") or _is_number(word):
            continue
        flag, _equals, content = word.partition("=")
        following = words[number + 1] if number + 1 < len(words) else "-"
        if not content and (not following.startswith("-") or _is_number(following)):
            content = following
        yield flag, content


def _is_number(word: str) -> bool:
    return word.lstrip("-").replace(".", "", 1).isdigit()


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"adopt_llama_server": adopt_llama_server}
