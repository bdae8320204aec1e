"""libllama's C interface, without the rest of llama-cpp-python: its package init would bring numpy and more."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

WARN, ERROR, CONTINUED = 3, 4, 5  # ggml_log_level
# What a deployment looks for, to see that the accelerator is used: how many layers are on it, and of how many.
ON_GPU = re.compile(r"offloaded (\d+)/(\d+) layers to GPU")


def load() -> Any:
    """The module llama_cpp.llama_cpp; needs LLAMA_CPP_LIB_PATH where the libraries are not in the package."""
    if "llama_cpp" not in sys.modules:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None:
            raise ImportError("llama-cpp-python is not installed")
        package = ModuleType("llama_cpp")
        package.__path__ = list(spec.submodule_search_locations or [])
        sys.modules["llama_cpp"] = package
    lib = importlib.import_module("llama_cpp.llama_cpp")
    _load_backends(lib._lib)
    return lib


def _load_backends(llama: ctypes.CDLL) -> None:
    """In a build for many kinds of CPU the backends are files beside libllama, and ggml looks beside the program."""
    llama.ggml_backend_dev_count.restype = ctypes.c_size_t
    if not llama.ggml_backend_dev_count():
        llama.ggml_backend_load_all_from_path(os.fsencode(Path(llama._name).parent))


class Log:
    """llama.cpp's warnings, errors and layers on a GPU go to standard error; `last_error` is the last error's line."""

    _registered: ClassVar[Any] = None  # llama.cpp holds on to the callback, for longer than its Log may be wanted

    def __init__(self, lib: Any) -> None:
        self.last_error = ""
        self.offloaded: tuple[int, int] | None = None  # layers, of how many
        self.muted = False
        self._out = os.dup(2)  # still the log while standard error is `silenced`
        self._level = 0
        callback = lib.llama_log_callback(self._write)
        lib.llama_log_set(callback, None)
        Log._registered = callback

    def _write(self, level: int, text: bytes, _user_data: Any) -> None:
        if level != CONTINUED:
            self._level = level
        if found := ON_GPU.search(text.decode(errors="replace")):
            self.offloaded = int(found[1]), int(found[2])
        elif self._level < WARN:
            return
        if not self.muted:
            os.write(self._out, text)
        if self._level == ERROR:
            self.last_error = text.decode(errors="replace").strip()
