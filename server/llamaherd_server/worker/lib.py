"""libllama's C interface, without the rest of llama-cpp-python: its package init would bring numpy and more."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any


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
