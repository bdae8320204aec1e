"""libllama's C interface, without the rest of llama-cpp-python: its package init would bring numpy and more."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

WARN, ERROR, CONTINUED = 3, 4, 5  # ggml_log_level


def load() -> Any:
    """The module llama_cpp.llama_cpp; needs LLAMA_CPP_LIB_PATH where the libraries are not in the package."""
    if "llama_cpp" not in sys.modules:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None:
            raise ImportError("llama-cpp-python is not installed")
        package = ModuleType("llama_cpp")
        package.__path__ = list(spec.submodule_search_locations or [])
        sys.modules["llama_cpp"] = package
    return importlib.import_module("llama_cpp.llama_cpp")


class Log:
    """llama.cpp's warnings and errors go to standard error; `last_error` is the last line that was an error."""

    def __init__(self, lib: Any) -> None:
        self.last_error = ""
        self.muted = False
        self._out = os.dup(2)  # still the log while standard error is `silenced`
        self._level = 0
        self._callback = lib.llama_log_callback(self._write)  # kept: llama.cpp holds on to it
        lib.llama_log_set(self._callback, None)

    def _write(self, level: int, text: bytes, _user_data: Any) -> None:
        if level != CONTINUED:
            self._level = level
        if self._level < WARN:
            return
        if not self.muted:
            os.write(self._out, text)
        if self._level == ERROR:
            self.last_error = text.decode(errors="replace").strip()


@contextmanager
def silenced() -> Iterator[None]:
    """What libllama prints past its log is lost: a grammar that it cannot parse, for one, and that is a user's text."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
