"""Loading libllama without the package around its binding."""

from __future__ import annotations

import importlib.util
import sys

from llamaherd_server.worker.lib import load


def test_the_package_is_not_executed_and_can_still_be_found() -> None:
    """Preparation looks for it in processes that have the library loaded, too."""
    load()
    assert not hasattr(sys.modules["llama_cpp"], "Llama")
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None and spec.name == "llama_cpp"
