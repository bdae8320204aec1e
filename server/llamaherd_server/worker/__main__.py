"""`python -m llamaherd_server.worker FD CONFIG`: the process that owns the model; its front end starts it."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
from typing import Any

import msgspec
from msgspec import Struct

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
    Shutdown,
    Text,
    Tokenize,
    Tokens,
    ToWorker,
)
from llamaherd_server.worker.channel import Channel, Closed
from llamaherd_server.worker.context import Context, DoesNotFit
from llamaherd_server.worker.lib import load
from llamaherd_server.worker.model import Model, ModelError
from llamaherd_server.worker.sampling import Sampler, SamplingError
from llamaherd_server.worker.scheduler import Scheduler
from llamaherd_server.worker.sequence import Sequence
from llamaherd_server.worker.text import TextStream

HEARTBEAT_S = 1.0
WARN = 3
PR_SET_PDEATHSIG = 1


class Config(Struct):
    """What the front end passes on the command line, as JSON."""

    path: str
    gpu_layers: int
    settings: EngineSettings


def main() -> int:
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    config = msgspec.json.decode(sys.argv[2], type=Config)
    # The front end drains on these; the worker ends when the socket does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        Worker(channel, config).run()
    except (ModelError, DoesNotFit) as error:
        channel.send(Failed(0, "does_not_fit" if isinstance(error, DoesNotFit) else "invalid_value", str(error)))
        return 1
    except Closed:
        return 0
    return 0


class Worker:
    """Messages in, steps out, on one thread."""

    def __init__(self, channel: Channel, config: Config) -> None:
        self._channel = channel
        began = time.perf_counter()
        lib = load()
        self._log = lib.llama_log_callback(_log)
        lib.llama_log_set(self._log, None)
        lib.llama_backend_init()
        self._model = Model(lib, config.path, config.gpu_layers, lambda done: channel.send(Loading(done)))
        self._context = Context(self._model, config.settings)
        self._context.warm_up()
        self._scheduler = Scheduler(self._context)
        channel.send(
            Ready(model=self._model.info(), settings=self._context.settings, load_s=time.perf_counter() - began)
        )

    def run(self) -> None:
        scheduler = self._scheduler
        while True:
            for message in self._channel.receive(HEARTBEAT_S if scheduler.idle else 0):
                if isinstance(message, Shutdown):
                    return
                self._handle(message)
            self._channel.send(scheduler.step())

    def _handle(self, message: ToWorker) -> None:
        if isinstance(message, Generate):
            self._accept(message)
        elif isinstance(message, Cancel):
            self._scheduler.cancel(message.id)
        elif isinstance(message, Retune):
            self._retune(message)
        elif isinstance(message, Tokenize):
            tokens = self._model.tokenize(
                message.text, add_special=message.add_special, parse_special=message.parse_special
            )
            self._channel.send(Tokens(message.id, tokens))
        elif isinstance(message, Detokenize):
            self._detokenize(message)

    def _accept(self, request: Generate) -> None:
        model, room = self._model, self._context.settings.ctx_per_slot
        prompt = request.prompt
        tokens = (
            model.tokenize(prompt, add_special=request.add_special, parse_special=request.parse_special)
            if isinstance(prompt, str)
            else list(prompt)
        )
        if not tokens:
            return self._fail(request.id, "invalid_value", "the prompt is empty", "prompt")
        if bad := next((token for token in tokens if not 0 <= token < model.n_vocab), None):
            return self._fail(request.id, "invalid_value", f"token {bad} is not in the vocabulary", "prompt")
        if len(tokens) >= room:
            text = f"the prompt has {len(tokens)} tokens, a slot holds {room}: shorten it or raise ctx_per_slot"
            return self._fail(request.id, "context_length_exceeded", text, "prompt")
        try:
            sampler = Sampler(model.lib, model.vocab, request.sampling, model.eog_tokens, tokens)
        except SamplingError as error:
            code = "invalid_grammar" if error.param == "grammar" else "invalid_value"
            return self._fail(request.id, code, str(error), error.param)
        limit = room if request.max_tokens is None else min(room, len(tokens) + request.max_tokens)
        self._scheduler.waiting.append(Sequence(request, tokens, sampler, TextStream(request.stop), limit))
        return None

    def _fail(self, request_id: int, code: Any, message: str, param: str | None = None) -> None:
        self._channel.send(Failed(request_id, code, message, param))

    def _retune(self, message: Retune) -> None:
        began = time.perf_counter()
        scheduler = self._scheduler
        longest = max((sequence.limit for sequence in [*scheduler.running, *scheduler.waiting]), default=0)
        old = self._context.settings
        if longest > message.settings.ctx_per_slot:
            text = f"a running request may need {longest} tokens, ctx_per_slot {message.settings.ctx_per_slot} is less"
            return self._fail(message.id, "does_not_fit", text)
        scheduler.park_all()
        self._context.close()
        try:
            context = Context(self._model, message.settings)
        except DoesNotFit as error:
            context = Context(self._model, old)
            self._fail(message.id, "does_not_fit", str(error))
        else:
            self._channel.send(Retuned(message.id, context.settings, time.perf_counter() - began))
        self._context = context
        scheduler.attach(context)
        return None

    def _detokenize(self, message: Detokenize) -> None:
        if bad := next((token for token in message.tokens if not 0 <= token < self._model.n_vocab), None):
            return self._fail(message.id, "invalid_value", f"token {bad} is not in the vocabulary", "tokens")
        self._channel.send(Text(message.id, self._model.detokenize(message.tokens)))
        return None


def _log(level: int, text: bytes, _user_data: Any) -> None:
    if level >= WARN:
        os.write(2, text)


if __name__ == "__main__":
    sys.exit(main())
