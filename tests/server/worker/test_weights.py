"""Where weights are put: what a host without an accelerator can show of it."""

from __future__ import annotations

import ctypes
import gc
import weakref
from typing import Any

import pytest

from llamaherd_server.wire.engine_settings import EngineSettings, Placement
from llamaherd_server.wire.protocol import WorkerConfig
from llamaherd_server.worker import weights
from llamaherd_server.worker.lib import Log, load
from llamaherd_server.worker.model import Model
from llamaherd_server.worker.weights import ModelError

from ..conftest import required


def loaded(lib: Any, **placement: Any) -> Model:
    config = WorkerConfig(
        path=required("LLAMAHERD_TEST_MODEL"), settings=EngineSettings(), placement=Placement(**placement)
    )
    return Model(lib, Log(lib), config, lambda _: None)


@pytest.mark.parametrize(
    "placement",
    [
        {"load_mode": "none"},
        {"load_mode": "mmap+mlock"},
        {"cpu_moe_layers": 1000, "gpu_layers": 3},
        {"split_mode": "none", "main_gpu": 0, "tensor_split": [1.0]},
        {"numa": "distribute"},
        {"gpu_layers": "auto"},
    ],
)
def test_every_placement_is_one_that_llama_cpp_takes(model: Model, placement: dict[str, Any]) -> None:
    assert loaded(model.lib, **placement).info().n_params == model.info().n_params


def test_a_device_that_is_not_there_is_named_with_those_that_are(model: Model) -> None:
    with pytest.raises(ModelError, match=r"devices: unknown device 'CUDA7'; available: .*CPU"):
        loaded(model.lib, devices=["CUDA7"])


def test_more_shares_than_devices_are_refused(model: Model) -> None:
    with pytest.raises(ModelError, match=r"tensor_split has 100 shares: .* supports at most"):
        loaded(model.lib, tensor_split=[1.0] * 100)


def test_experts_are_overridden_layer_by_layer(model: Model) -> None:
    overrides = weights._overrides(model.lib._lib, weights._experts(2))
    patterns = [one.pattern for one in overrides]
    assert patterns == [
        rb"blk\.0\.ffn_(up|down|gate|gate_up)_(ch|)exps",
        rb"blk\.1\.ffn_(up|down|gate|gate_up)_(ch|)exps",
        None,
    ]
    assert {bool(one.buffer_type) for one in overrides[:2]} == {True}
    assert ctypes.sizeof(overrides[0]) == 2 * ctypes.sizeof(ctypes.c_void_p)


def test_llama_cpp_can_write_to_a_log_that_nobody_has_kept() -> None:
    log = weakref.ref(Log(load()))
    gc.collect()
    assert log() is not None
