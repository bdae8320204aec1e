"""Rejected drafts of a model with a recurrent state, which is rolled back: what is copied of it is what is left."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.wire.protocol import WorkerConfig
from llamaherd_server.worker.context import Context
from llamaherd_server.worker.interrupt import Interrupt
from llamaherd_server.worker.lib import Log, load
from llamaherd_server.worker.model import Model
from tests.random_models import RandomModel

from .test_warm import Alone

SETTINGS = EngineSettings(
    parallel=2, ctx_per_slot=512, batch=128, ubatch=64, threads=1, speculative="ngram", speculative_depth=4
)
NEXT = 4321


@pytest.fixture(scope="module")
def hybrid() -> Model:
    lib = load()
    lib.llama_backend_init()
    path = RandomModel("hybrid", layers=6, width=128).path()
    return Model(lib, Log(lib), WorkerConfig(path=str(path), settings=SETTINGS), lambda _: None)


@pytest.fixture
def context(hybrid: Model) -> Iterator[Context]:
    context = Context(hybrid, SETTINGS, Interrupt(hybrid.lib, hybrid.log))
    yield context
    context.close()


def computed(context: Context, tokens: list[int], slot: int = 0, start: int = 0, draft: list[int] | None = None) -> Any:
    """Logits after `tokens` from `start` on, and after each token of the draft behind them."""
    sequence = Alone([*tokens])
    sequence.slot, sequence.computed, sequence.draft = slot, start, draft or []  # type: ignore[misc]
    count = len(tokens) - start + len(sequence.draft)
    assert context.decode([(sequence, count)]) == 0  # type: ignore[list-item]
    return np.array(context._lib.llama_get_logits_ith(context._handle, -1)[: context._model.n_vocab])


def rejected(context: Context) -> list[int]:
    """The tokens in slot 0 after a draft of which one token was accepted."""
    tokens = random.Random(1).sample(range(1000, 9000), 40)
    computed(context, tokens[:-2])
    computed(context, tokens[:-1], start=38, draft=[tokens[-1], 5, 6, 7])
    context.reject(0, len(tokens))
    return tokens


def expected(context: Context, tokens: list[int]) -> Any:
    context.forget(1)
    return computed(context, [*tokens, NEXT], slot=1)


def test_the_slot_goes_on(context: Context) -> None:
    tokens = rejected(context)
    logits = computed(context, [*tokens, NEXT], start=len(tokens))
    assert np.abs(logits - expected(context, tokens)).max() < 0.02


def test_another_slot_shares_what_is_left(context: Context) -> None:
    tokens = rejected(context)
    context.share(0, 1, len(tokens))
    logits = computed(context, [*tokens, NEXT], slot=1, start=len(tokens))
    assert np.abs(logits - expected(context, tokens)).max() < 0.02


def test_a_part_of_what_is_left_is_saved(context: Context) -> None:
    tokens = rejected(context)
    parts = [(*saved(context, 0), 20), (*saved(context, 20), len(tokens))]
    assert context.load_parts(1, parts, back=None)
    logits = computed(context, [*tokens, NEXT], slot=1, start=len(tokens))
    assert np.abs(logits - expected(context, tokens)).max() < 0.02


def saved(context: Context, start: int) -> tuple[Any, int]:
    states: list[Any] = []

    def buffer(size: int) -> Any:
        states.append((ctypes.c_uint8 * size)())
        return states[-1]

    size = context.save_part(0, start, buffer)
    return states[0], size
