"""Messages in, steps out, on the one thread that owns the context."""

from __future__ import annotations

import time

from llamaherd_server.protocol import (
    Cancel,
    Detokenize,
    EngineSettings,
    Failed,
    Generate,
    Loading,
    Ready,
    Retune,
    Retuned,
    Text,
    Tokenize,
    Tokens,
    ToWorker,
    WorkerConfig,
)
from llamaherd_server.worker.channel import Channel
from llamaherd_server.worker.context import Context, resolve_threads
from llamaherd_server.worker.errors import RequestError
from llamaherd_server.worker.intake import limit, sequence_of, slot_tokens
from llamaherd_server.worker.lib import Log, load
from llamaherd_server.worker.memory import DoesNotFit, check_fits
from llamaherd_server.worker.model import Model
from llamaherd_server.worker.scheduler import Scheduler

HEARTBEAT_S = 1.0


class Service:
    """Loads the model, says Ready, and serves `channel` until the front end goes. Raises ModelError, DoesNotFit."""

    def __init__(self, channel: Channel, config: WorkerConfig) -> None:
        began = time.perf_counter()
        lib = load()
        log = Log(lib)
        lib.llama_backend_init()
        self._channel = channel
        self._model = Model(lib, log, config.path, config.gpu_layers, lambda done: channel.send(Loading(done)))
        self._context = Context(self._model, config.settings)
        self._context.warm_up()
        self._scheduler = Scheduler(self._context)
        load_s = time.perf_counter() - began
        channel.send(Ready(model=self._model.info(), settings=self._context.settings, load_s=load_s))

    def run(self) -> None:
        """Until the front end closes the channel, which raises Closed."""
        while True:
            for message in self._channel.receive(HEARTBEAT_S if self._scheduler.idle else 0):
                try:
                    self._handle(message)
                except RequestError as error:
                    self._channel.send(Failed(message.id, error.code, error.message, error.param))
            self._channel.send(self._scheduler.step())

    def _handle(self, message: ToWorker) -> None:
        model = self._model
        if isinstance(message, Generate):
            self._scheduler.add(sequence_of(model, self._context.settings, message))
        elif isinstance(message, Cancel):
            self._scheduler.cancel(message.id)
        elif isinstance(message, Retune):
            self._retune(message)
        elif isinstance(message, Tokenize):
            add, parse = message.add_special, message.parse_special
            self._channel.send(Tokens(message.id, model.tokenize(message.text, add_special=add, parse_special=parse)))
        else:
            self._detokenize(message)

    def _detokenize(self, message: Detokenize) -> None:
        unknown = self._model.unknown(message.tokens)
        if unknown is not None:
            raise RequestError("invalid_value", "tokens", f"token {unknown} is not in the vocabulary")
        self._channel.send(Text(message.id, self._model.detokenize(message.tokens)))

    def _retune(self, message: Retune) -> None:
        """Build another context over the loaded weights; where that cannot be, the old settings stay in force."""
        began = time.perf_counter()
        old, new = self._context.settings, resolve_threads(message.settings)
        self._check_retune(new)
        self._scheduler.park_all(keep=_same_cells(old, new))
        self._context.close()
        try:
            self._context = Context(self._model, new)
        except DoesNotFit as error:
            self._context = Context(self._model, old)
            raise RequestError("does_not_fit", None, str(error)) from None
        finally:
            self._scheduler.attach(self._context)
        for sequence in self._scheduler.waiting:
            sequence.limit = limit(sequence.request, sequence.n_prompt, slot_tokens(new))
        self._channel.send(Retuned(message.id, self._context.settings, time.perf_counter() - began))

    def _check_retune(self, new: EngineSettings) -> None:
        """Refuse what has no room in memory, or would cut a request short; raises RequestError."""
        try:
            check_fits(self._model, new, released=self._context.memory_bytes)
        except DoesNotFit as error:
            raise RequestError("does_not_fit", None, str(error)) from None
        room, old_room = slot_tokens(new), slot_tokens(self._context.settings)
        for sequence in (*self._scheduler.running, *self._scheduler.waiting):
            # One that would have filled its slot anyway may end earlier; one that was promised its tokens gets them.
            needed = sequence.limit if sequence.limit < old_room else len(sequence.tokens) + 1
            if needed > room:
                message = f"a running request needs {needed} tokens, a slot would hold {room}: raise ctx_per_slot"
                raise RequestError("does_not_fit", "ctx_per_slot", message)


def _same_cells(one: EngineSettings, other: EngineSettings) -> bool:
    """Whether what was saved of a context's KV cells can be put into the other's."""
    fields = ("kv_unified", "kv_type_k", "kv_type_v", "flash_attention")
    return all(getattr(one, field) == getattr(other, field) for field in fields)
