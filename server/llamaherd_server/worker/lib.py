"""Loads libllama's C interface without llama-cpp-python's package init, which would import numpy and more."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any, ClassVar

WARN, ERROR, CONTINUED = 3, 4, 5  # ggml_log_level
# Offloaded layers and all layers. A deployment looks for this line to verify that the accelerator is used.
ON_GPU = re.compile(r"offloaded (\d+)/(\d+) layers to GPU")


def load() -> Any:
    """Return the module llama_cpp.llama_cpp. Set LLAMA_CPP_LIB_PATH if the libraries are not in the package."""
    if "llama_cpp" not in sys.modules:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None:
            raise ImportError("llama-cpp-python is not installed")
        sys.modules["llama_cpp"] = importlib.util.module_from_spec(spec)
    lib = importlib.import_module("llama_cpp.llama_cpp")
    _load_backends(lib._lib)
    return lib


def _load_backends(llama: ctypes.CDLL) -> None:
    """Load the backend files that builds for many CPU types have beside libllama; ggml looks beside the program."""
    llama.ggml_backend_dev_count.restype = ctypes.c_size_t
    if not llama.ggml_backend_dev_count():
        llama.ggml_backend_load_all_from_path(os.fsencode(Path(llama._name).parent))


class Log:
    """Writes llama.cpp's warnings, errors and GPU layer counts to standard error; `last_error` is the last error."""

    _registered: ClassVar[Any] = None  # llama.cpp keeps the callback, which may outlive its Log

    def __init__(self, lib: Any) -> None:
        self.last_error = ""
        self.offloaded: tuple[int, int] | None = None  # offloaded layers, all layers
        self.muted = False
        self._out = os.dup(2)
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
