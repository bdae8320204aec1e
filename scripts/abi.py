"""Writes roles/llama_cpp/files/abi.c: the part of llama.cpp's C interface that the worker uses through the binding.

If it compiles against another llama.cpp, that one has the same structures, constants and functions. Run
`python -m scripts.abi SOURCE`, where SOURCE is the llama.cpp of the installed binding.
"""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path
from typing import Any

from llamaherd_server.worker.context import FLASH, KV_TYPES
from llamaherd_server.worker.lib import load

ROOT = Path(__file__).resolve().parents[1]
PROBE = ROOT / "roles/llama_cpp/files/abi.c"
WORKER = ROOT / "server/llamaherd_server/worker"
STRUCTURES = (
    *("llama_model_params", "llama_context_params", "llama_sampler_chain_params", "llama_batch"),
    *("llama_token_data", "llama_token_data_array", "llama_logit_bias"),
)
HEAD = """\
// Written by scripts/abi.py. What the worker takes of llama.cpp, as llama-cpp-python {version} has it.
#include <stddef.h>
#include "llama.h"
"""


def used() -> set[str]:
    """Return the functions and constants of libllama that the worker uses."""
    text = "\n".join(path.read_text() for path in WORKER.glob("*.py"))
    return {*re.findall(r"lib\.((?:llama|LLAMA)_\w+)", text)}


def layout(lib: Any) -> list[str]:
    """Return one assertion for the size of each structure and for the offset of each field, in bytes."""
    lines = []
    for name in STRUCTURES:
        kind = getattr(lib, name)
        lines.append(f'_Static_assert(sizeof(struct {name}) == {ctypes.sizeof(kind)}, "{name}");')
        for field, *_ in kind._fields_:
            offset = getattr(kind, field).offset
            lines.append(f'_Static_assert(offsetof(struct {name}, {field}) == {offset}, "{name}.{field}");')
    return lines


def numbers(lib: Any) -> list[str]:
    """Return one assertion for each constant."""
    modes = (f"{kind}_{mode}" for kind, some in _MODES.items() for mode in some)
    found = {name: int(getattr(lib, name)) for name in {*modes, *used()} if name.startswith("LLAMA_")}
    found |= {f"GGML_TYPE_{name.upper()}": value for name, value in KV_TYPES.items()}
    names = {"auto": "AUTO", "off": "DISABLED", "on": "ENABLED"}
    found |= {f"LLAMA_FLASH_ATTN_TYPE_{names[name]}": value for name, value in FLASH.items()}
    del found["LLAMA_MAX_DEVICES"]  # the binding gets its value from a function
    return [f'_Static_assert({name} == {value}, "{name}");' for name, value in sorted(found.items())]


_MODES = {
    "LLAMA_SPLIT_MODE": ("NONE", "LAYER", "ROW", "TENSOR"),
    "LLAMA_STATE_SEQ_FLAGS": ("PARTIAL_ONLY",),
    "LLAMA_POOLING_TYPE": ("NONE", "MEAN", "CLS", "LAST", "RANK"),
}


def functions(header: str) -> list[str]:
    """Return one function pointer for each function, with the type of its declaration."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", header, flags=re.DOTALL)
    declared = {
        found[2]: " ".join(f"{found[1]}(*const check_{found[2]}){found[3]} = {found[2]};".split())
        for found in re.finditer(r"LLAMA_API\s+([\w\s*]+?)\s*\b(llama_\w+)\s*(\([^;]*\))\s*;", text)
    }
    return [f"static {declared[name]}" for name in sorted(used() & {*declared})]


if __name__ == "__main__":
    lib = load()
    source = Path(sys.argv[1])
    version = re.search(r"llama_cpp_python-([\d.]+)", str(source.resolve()))
    header = (source / "include/llama.h").read_text()
    parts = [layout(lib), numbers(lib), functions(header)]
    text = HEAD.format(version=version[1] if version else "") + "\n" + "\n\n".join(map("\n".join, parts)) + "\n"
    PROBE.write_text(text)
