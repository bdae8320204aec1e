"""The worker's main loop, on the one thread that owns the contexts."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from llamaherd_server.process.priority import lower
from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.wire.errors import RequestError
from llamaherd_server.wire.protocol import Cancel, Failed, Loading, Ready, Retune, Retuned, WorkerConfig
from llamaherd_server.worker.arena import Arena
from llamaherd_server.worker.channel import Channel
from llamaherd_server.worker.context import Context, resolve_threads
from llamaherd_server.worker.embedding import Embedder, Job
from llamaherd_server.worker.evaluation import EvaluationJob, Evaluator
from llamaherd_server.worker.identity import identity
from llamaherd_server.worker.intake import Intake, Work, fit, slot_tokens
from llamaherd_server.worker.interrupt import Interrupt
from llamaherd_server.worker.lib import Log, load
from llamaherd_server.worker.memory import DoesNotFit, check_fits
from llamaherd_server.worker.model import Model
from llamaherd_server.worker.prompts import PromptCache
from llamaherd_server.worker.scheduler import Scheduler
from llamaherd_server.worker.sequence import Sequence

HEARTBEAT_S = 1.0
PREFETCH_BYTES = 2**30  # of prompts that a new worker reads from disk before a request needs them


class Service:
    """Loads the model, sends Ready and serves `channel`. Raises ModelError, DoesNotFit."""

    def __init__(self, channel: Channel, config: WorkerConfig) -> None:
        began = time.perf_counter()
        lib = load()
        log = Log(lib)
        lib.llama_backend_init()
        self._channel = channel
        self._model = Model(lib, log, config, lambda done: channel.send(Loading(done)))
        self._prompts = _prompt_cache(config, self._model)
        self._interrupt = Interrupt(lib, log)
        self._context = Context(self._model, config.settings, self._interrupt)
        self._context.warm_up()
        self._scheduler = Scheduler(self._context, channel.send, self._prompts)
        causal = self._context.generates and self._model.attends_backwards
        self._embedder = Embedder(self._model, self._interrupt, causal=causal)
        self._evaluator = Evaluator(self._model, self._interrupt)
        self._beside: tuple[Embedder | Evaluator, ...] = (self._embedder, self._evaluator)
        load_s = time.perf_counter() - began
        channel.send(Ready(model=self._model.info(), settings=self._context.settings, load_s=load_s))

    def run(self) -> None:
        """Serve until the front end closes the channel, which raises Closed."""
        if self._prompts:
            threading.Thread(target=_fetch_latest, args=(self._prompts,), daemon=True).start()
        intake = Intake(self._channel, self._model, self._interrupt, self._room, self._prompts)
        while True:
            idle = self._scheduler.settled and all(one.idle for one in self._beside)
            for work in intake.take(HEARTBEAT_S if idle else 0):
                self._handle(work)
            self._interrupt.update_batch_window(self._scheduler.only_prefilling)
            self._channel.send(self._scheduler.step())
            for one in self._beside:
                for answer in one.step(self._context.settings, alone=self._scheduler.idle):
                    self._channel.send(answer)

    def _room(self) -> int:
        return slot_tokens(self._context.settings)

    def _handle(self, work: Work) -> None:
        try:
            if isinstance(work, Sequence):
                self._begin(work)
            elif isinstance(work, Job):
                self._embedder.add(work, self._context.settings)
            elif isinstance(work, EvaluationJob):
                self._check_generates()
                self._evaluator.add(work)
            elif isinstance(work, Cancel):
                self._scheduler.cancel(work.id)
                for one in self._beside:
                    one.cancel(work.id)
            else:
                self._retune(work)
        except RequestError as error:
            self._channel.send(Failed(work.id, error.code, error.message, error.param, error.details))

    def _begin(self, sequence: Sequence) -> None:
        try:
            self._check_generates()
            fit(sequence, slot_tokens(self._context.settings))
        except RequestError:
            sequence.sampler.close()
            raise
        self._scheduler.add(sequence)

    def _check_generates(self) -> None:
        if not self._context.generates:
            raise RequestError("unsupported", "model", "this model generates no text: it is for embeddings")

    def _retune(self, message: Retune) -> None:
        """Rebuild the context over the loaded weights; if that fails, the old settings stay current."""
        began = time.perf_counter()
        old, new = self._context.settings, resolve_threads(message.settings)
        self._check_retune(new)
        for one in self._beside:
            one.close()
        self._scheduler.preempt_all(keep=_same_cells(old, new))
        self._context.close()
        try:
            self._context = Context(self._model, new, self._interrupt)
        except DoesNotFit as error:
            self._context = Context(self._model, old, self._interrupt)
            raise RequestError("does_not_fit", None, str(error)) from None
        finally:
            self._scheduler.attach(self._context)
        for sequence in self._scheduler.waiting:
            fit(sequence, slot_tokens(new))
        self._channel.send(Retuned(message.id, self._context.settings, time.perf_counter() - began))

    def _check_retune(self, new: EngineSettings) -> None:
        """Raise RequestError if the settings do not fit into memory, or would cut a request short."""
        try:
            beside = sum(one.memory_bytes for one in self._beside)
            check_fits(self._model, new, released=self._context.memory_bytes + beside)
        except DoesNotFit as error:
            raise RequestError("does_not_fit", None, str(error)) from None
        room, old_room = slot_tokens(new), slot_tokens(self._context.settings)
        for sequence in (*self._scheduler.running, *self._scheduler.waiting):
            # A request bound only by its slot may end earlier; one bound by max_tokens must get all of them.
            needed = sequence.limit if sequence.limit < old_room else len(sequence.tokens) + 1
            if needed > room:
                message = f"a running request needs {needed} tokens, a slot would hold {room}: raise ctx_per_slot"
                raise RequestError("does_not_fit", "ctx_per_slot", message)


def _prompt_cache(config: WorkerConfig, model: Model) -> PromptCache | None:
    if config.prompts is None:
        return None
    arena = Arena(config.prompts.fd, config.prompts.bytes)
    folder = Path(config.prompts.folder) if config.prompts.folder else None
    return PromptCache(arena, identity(model.lib, config, model.fit), folder)


def _fetch_latest(prompts: PromptCache) -> None:
    lower()
    prompts.fetch_latest(PREFETCH_BYTES)


def _same_cells(one: EngineSettings, other: EngineSettings) -> bool:
    """Whether a context with one of these settings can restore KV state saved with the other."""
    fields = ("kv_unified", "kv_type_k", "kv_type_v", "flash_attention")
    return all(getattr(one, field) == getattr(other, field) for field in fields)
