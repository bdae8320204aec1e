"""What of llama-server's log becomes the server's."""

from __future__ import annotations

import json

import pytest

from llamaherd_server.engine.native_process import NativeProcess
from llamaherd_server.wire.engine_settings import Placed

ENTRIES = [
    ("info", "load_model: loading model 'm.gguf'\n"),
    ("info", "common_params_fit_impl:   - Vulkan0 (llvmpipe): 12 layers ( 3 overflowing),    900 MiB used"),
    ("warn", "a warning\nwith more of it\n"),
    ("info", "load_tensors: offloaded 12/31 layers to GPU\n"),
    ("error", "an error\n"),
]


def test_it_is_what_went_wrong_and_the_layers_on_an_accelerator(capsys: pytest.CaptureFixture[str]) -> None:
    process = NativeProcess()
    process._partial = 0
    for level, text in ENTRIES:
        process._pass_on_entry(json.dumps({"type": "log", "time": 1, "level": level, "msg": text}).encode())
    process._pass_on_entry(b"no JSON, for it is cut")
    passed_on = [r"a warning\nwith more of it", "load_tensors: offloaded 12/31 layers to GPU", "an error"]
    assert capsys.readouterr().err.splitlines() == passed_on
    assert process._placed == Placed(gpu_layers=12, layers=31, partial_layers=3)
