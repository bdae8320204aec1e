"""What a unit file tells llama-server, as llamaherd's variables."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from typing import Any

# llama-server --help: every spelling of a flag that says what a variable of ours says.
_MODEL = ("-m", "--model", "LLAMA_ARG_MODEL")
_ALIAS = ("-a", "--alias", "LLAMA_ARG_ALIAS")
_CONTEXT = ("-c", "--ctx-size", "LLAMA_ARG_CTX_SIZE")
_PARALLEL = ("-np", "--parallel", "LLAMA_ARG_N_PARALLEL")
_PORT = ("--port", "LLAMA_ARG_PORT")
_GPU_LAYERS = ("-ngl", "--gpu-layers", "--n-gpu-layers", "LLAMA_ARG_N_GPU_LAYERS")
_SETTINGS: dict[str, tuple[tuple[str, ...], Callable[[str], Any]]] = {
    "batch": (("-b", "--batch-size", "LLAMA_ARG_BATCH"), int),
    "ubatch": (("-ub", "--ubatch-size", "LLAMA_ARG_UBATCH"), int),
    "kv_type_k": (("-ctk", "--cache-type-k", "LLAMA_ARG_CACHE_TYPE_K"), str),
    "kv_type_v": (("-ctv", "--cache-type-v", "LLAMA_ARG_CACHE_TYPE_V"), str),
    "flash_attention": (("-fa", "--flash-attn", "LLAMA_ARG_FLASH_ATTN"), str),
    "threads": (("-t", "--threads", "LLAMA_ARG_THREADS"), int),
    "threads_batch": (("-tb", "--threads-batch", "LLAMA_ARG_THREADS_BATCH"), int),
}
_UNIFIED = {"-kvu": True, "--kv-unified": True, "-no-kvu": False, "--no-kv-unified": False}
# What llamaherd always does, or does in a way of its own.
_COVERED = {
    "--host": "nginx listens, the server stays on loopback",
    "LLAMA_ARG_HOST": "nginx listens, the server stays on loopback",
    "--api-key": "llamaherd_keys: new keys, named and hashed; the old one is not taken over",
    "LLAMA_API_KEY": "llamaherd_keys: new keys, named and hashed; the old one is not taken over",
    "--api-key-file": "llamaherd_keys: new keys, named and hashed; the old ones are not taken over",
    "--ssl-key-file": "nginx has a certificate of its own",
    "--ssl-cert-file": "nginx has a certificate of its own",
    "-cb": "always on",
    "--cont-batching": "always on",
    "--metrics": "always on",
    "--jinja": "always on",
}


def adopt_llama_server(unit: str) -> dict[str, Any]:
    """Read a unit's text as `systemctl cat` prints it.

    Returns path (the GGUF, "" where the unit names none), name, port, gpu_layers and settings (with what the unit says
    alone), ctx_size and parallel as llama-server counts them (0: not said), and left: flag and reason for the rest.
    """
    flags = dict(_flags(unit))

    def take(names: tuple[str, ...], kind: Callable[[str], Any], default: Any) -> Any:
        found = [flags.pop(name) for name in names if name in flags]
        return kind(found[0]) if found else default

    path = take(_MODEL, str, "")
    adopted: dict[str, Any] = {
        "path": path,
        "name": take(_ALIAS, str, path.rsplit("/", 1)[-1].removesuffix(".gguf").lower()),
        "port": take(_PORT, int, 8080),
        "gpu_layers": take(_GPU_LAYERS, _layers, -1),
        "ctx_size": take(_CONTEXT, int, 0),
        "parallel": take(_PARALLEL, int, 0),
        "settings": {},
    }
    for setting, (names, kind) in _SETTINGS.items():
        if (value := take(names, kind, None)) is not None:
            adopted["settings"][setting] = value
    for flag in _UNIFIED.keys() & flags.keys():
        del flags[flag]
        adopted["settings"]["kv_unified"] = _UNIFIED[flag]
    adopted["left"] = [
        {"flag": flag, "reason": _COVERED.get(flag, f"not taken over{f': was {value}' if value else ''}")}
        for flag, value in flags.items()
    ]
    return adopted


def _layers(value: str) -> int:
    return int(value) if value.isdigit() else -1


def _flags(unit: str) -> Iterator[tuple[str, str]]:
    """Each flag of ExecStart, and each LLAMA_ variable of Environment, with its value."""
    joined = unit.replace("\\\n", " ")
    values = [line.partition("=") for line in map(str.strip, joined.splitlines()) if not line.startswith(("#", ";"))]
    for name, _, value in values:
        for assignment in shlex.split(value) if name == "Environment" else ():
            variable, _, content = assignment.partition("=")
            if variable.startswith("LLAMA_"):
                yield variable, content
    commands = [value for name, _, value in values if name == "ExecStart" and value]
    words = shlex.split(commands[-1])[1:] if commands else []
    for number, word in enumerate(words):
        if not word.startswith("-") or _is_number(word):
            continue
        flag, _, content = word.partition("=")
        following = words[number + 1] if number + 1 < len(words) else "-"
        if not content and (not following.startswith("-") or _is_number(following)):
            content = following
        yield flag, content


def _is_number(word: str) -> bool:
    return word.lstrip("-").replace(".", "", 1).isdigit()


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"adopt_llama_server": adopt_llama_server}
