"""The probe that a llama.cpp of one's own is held against: it has all that the worker takes, as the binding has it."""

from __future__ import annotations

from llamaherd_server.worker.lib import load
from scripts.abi import PROBE, layout, numbers, used

# Types of the binding's own.
NOT_IN_C = {"llama_adapter_lora_p_ctypes", "llama_log_callback", "llama_progress_callback"}


def test_it_names_all_functions_and_numbers_of_the_worker() -> None:
    probe = PROBE.read_text()
    values = {"LLAMA_MAX_DEVICES"}
    assert not {name for name in used() - NOT_IN_C - values if name not in probe}, "python -m scripts.abi SOURCE"


def test_it_has_the_layout_of_the_installed_binding() -> None:
    lib = load()
    assert {*layout(lib), *numbers(lib)} <= {*PROBE.read_text().splitlines()}, "python -m scripts.abi SOURCE"
