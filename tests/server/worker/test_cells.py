"""The scheduler over a real context: its books are llama.cpp's own, with cells shared, cancels and aborted steps."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest

from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.wire.protocol import Failed, Generate, Sampling
from llamaherd_server.worker.context import Context
from llamaherd_server.worker.intake import fit, sequence_of
from llamaherd_server.worker.interrupt import Interrupt
from llamaherd_server.worker.kv import KvCache
from llamaherd_server.worker.model import Model
from llamaherd_server.worker.scheduler import Scheduler

REQUESTS = 24


class Watched(Scheduler):
    """Gives its books away."""

    @property
    def books(self) -> KvCache:
        return self._kv


def arrivals(seed: int) -> Iterator[Generate]:
    """Prompts that often begin alike, and a few that end at once."""
    generator = random.Random(seed)
    systems = [[generator.randrange(1000, 9000) for _ in range(50)] for _ in range(2)]
    for number in range(REQUESTS):
        prompt = [*generator.choice(systems)[: generator.randrange(4, 51)], *([number] * generator.randrange(1, 20))]
        sampling = Sampling(temperature=0, ignore_eos=True)
        yield Generate(id=number, prompt=prompt, max_tokens=generator.randrange(1, 12), sampling=sampling)


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "split"])
def test_the_books_are_llama_cpps_own(model: Model, unified: bool) -> None:
    settings = EngineSettings(
        parallel=4, ctx_per_slot=128, kv_unified=unified, kv_cells=128 * unified, batch=128, ubatch=32, threads=1
    )
    interrupt = Interrupt(model.lib, model.log)
    context = Context(model, settings, interrupt)
    scheduler = Watched(context)
    generator = random.Random(1)
    todo = list(arrivals(1))
    ended: list[int] = []
    cancelled: set[int] = set()
    while todo or not scheduler.idle:
        if todo and generator.random() < 0.5:
            sequence = sequence_of(model, todo.pop())
            fit(sequence, 128)
            scheduler.add(sequence)
        running = [sequence.id for sequence in scheduler.running]
        if running and generator.random() < 0.05:
            cancelled.add(running[0])
            scheduler.cancel(running[0])
        if generator.random() < 0.3:  # perhaps between two ubatches of the step
            threading.Timer(generator.random() / 20, interrupt.set).start()
        step = scheduler.step()
        interrupt.clear()
        ended += [event.id for event in step.events if hasattr(event, "reason")]
        assert not any(isinstance(event, Failed) for event in step.events)
        for slot in scheduler.books.slots:
            assert context.held(slot.number) == slot.length
            if slot.sequence:
                assert slot.sequence.computed == slot.length
    assert sorted([*ended, *cancelled]) == list(range(REQUESTS))
    context.close()
