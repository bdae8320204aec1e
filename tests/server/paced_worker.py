"""A worker process without a model, which paces its tokens by the clock.

Only the model is doubled: the process, its socket, the protocol, the supervisor and all of the front end are the real
ones. A server with doubled/ on its PYTHONPATH and WORKER_DOUBLE=<this file> starts it in the place of its worker, and
so do tests, benchmarks and fleets of lab hosts that shall not compute. It needs nothing but llamaherd_server's package.

Every step lasts PACED_STEP_MS (20), and PACED_SLOT_MS (0) more for each running sequence, and gives each one token; a
prompt is read at PACED_PREFILL (5000) tokens/s, four characters a token, before its first token; a completion without
max_tokens has PACED_TOKENS (64). There are as many slots as the engine's settings say. A token's text is a space and
the CLOCK_MONOTONIC reading, in nanoseconds, at which its step was sent, so that a client on the same machine can tell
what the front end adds.
"""

from __future__ import annotations

import math
import os
import select
import signal
import socket
import struct
import sys
import time
from array import array
from collections import deque
from dataclasses import dataclass

import msgspec

from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.wire.evaluation import Evaluate, Evaluated, Evaluation
from llamaherd_server.wire.protocol import (
    Cancel,
    Delta,
    Detokenize,
    Embed,
    Embedded,
    Failed,
    Finished,
    Generate,
    ModelInfo,
    Ready,
    Retune,
    Retuned,
    Started,
    Stats,
    Step,
    Text,
    Tokenize,
    TokenLogprob,
    Tokens,
    ToWorker,
    WorkerConfig,
)
from llamaherd_server.worker.channel import Channel, Closed

STEP_S = float(os.environ.get("PACED_STEP_MS", "20")) / 1000
SLOT_S = float(os.environ.get("PACED_SLOT_MS", "0")) / 1000
PREFILL = float(os.environ.get("PACED_PREFILL", "5000"))
TOKENS = int(os.environ.get("PACED_TOKENS", "64"))
HEARTBEAT_S = 1.0
DEADLY = "die"  # the prompt that ends this worker as soon as it has begun

Events = list[Started | Delta | Finished | Failed]
MODEL = ModelInfo(
    description="paced double",
    architecture="paced",
    n_params=1,
    size_bytes=1,
    n_ctx_train=2**17,
    n_vocab=256,
    n_embd=1,
    add_bos=False,
    bos_token="<s>",
    eos_token="</s>",
    chat_template=None,
    build="paced double",
)


@dataclass
class Sequence:
    """A request; `ready` is when its prompt will have been read."""

    request: Generate
    n_prompt: int
    limit: int
    arrived: float
    ready: float = math.inf
    first: float = math.nan
    n_tokens: int = 0


class Paced:
    """Serves the channel until the front end goes, which raises Closed."""

    def __init__(self, sock: socket.socket, settings: EngineSettings) -> None:
        self._socket = sock
        self._channel = channel = Channel(sock)
        self._settings = settings
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}
        self._failed: Events = []
        self._step = 0
        channel.send(Ready(model=MODEL, settings=settings, load_s=0.0))

    def run(self) -> None:
        while True:
            idle = not (self._running or self._waiting or self._failed)
            self._listen(time.monotonic() + (HEARTBEAT_S if idle else self._pace), first_only=idle)
            self._channel.send(self._advance())

    @property
    def _pace(self) -> float:
        return STEP_S + SLOT_S * len(self._running)

    def _listen(self, until: float, *, first_only: bool) -> None:
        """Take messages until the step is over; an idle worker's step ends when something comes."""
        while (left := until - time.monotonic()) > 0:
            if not select.select([self._socket], [], [], left)[0]:
                return
            messages = self._channel.receive()
            for message in messages:
                self._handle(message)
            if messages and first_only:
                return

    def _handle(self, message: ToWorker) -> None:
        if isinstance(message, Generate):
            self._add(message)
        elif isinstance(message, Cancel):
            self._running.pop(message.id, None)
            self._waiting = deque(one for one in self._waiting if one.request.id != message.id)
        elif isinstance(message, Retune):
            self._settings = message.settings
            self._channel.send(Retuned(message.id, message.settings, 0.0))
        elif isinstance(message, Tokenize):
            self._channel.send(Tokens(message.id, len(message.text.encode()), list(message.text.encode())))
        elif isinstance(message, Detokenize):
            self._detokenize(message)
        elif isinstance(message, Embed):
            vectors = [struct.pack("f", 1.0)] * len(message.inputs)
            self._channel.send(Embedded(message.id, vectors, sum(map(len, message.inputs))))
        elif isinstance(message, Evaluate):
            self._evaluate(message)

    def _evaluate(self, message: Evaluate) -> None:
        """Every token is as likely as any other of `top`."""
        found, even = [], -math.log(message.top)
        for one in message.inputs:
            rows = len(one.tokens) - one.start + 1
            own = array("f", [even] * (rows - 1) + [math.nan])
            tokens, even_ones = array("i", [*range(message.top)] * rows), array("f", [even] * rows * message.top)
            found.append(Evaluation(own.tobytes(), tokens.tobytes(), even_ones.tobytes()))
        pieces = {token: bytes([token % 128]) for one in message.inputs for token in (*one.tokens, *range(message.top))}
        self._channel.send(Evaluated(message.id, found, pieces))

    def _detokenize(self, message: Detokenize) -> None:
        try:
            text = bytes(message.tokens).decode(errors="replace")
        except ValueError:
            self._channel.send(Failed(message.id, "invalid_value", "a token is not in the vocabulary", "tokens"))
        else:
            self._channel.send(Text(message.id, text, [bytes([token]) for token in message.tokens if message.apart]))

    def _add(self, request: Generate) -> None:
        scale = 4 if isinstance(request.prompt, str) else 1
        n_prompt = math.ceil(len(request.prompt) / scale)
        room = self._settings.ctx_per_slot - n_prompt
        if room < 1:
            self._failed.append(Failed(request.id, "context_length_exceeded", "the prompt is too long", "prompt"))
            return
        limit = min(room, request.max_tokens or TOKENS)
        self._waiting.append(Sequence(request, n_prompt, limit, time.monotonic()))

    def _advance(self) -> Step:
        """What one step has to say."""
        now = time.monotonic()
        events, self._failed = self._failed, []
        while self._waiting and len(self._running) < self._settings.parallel:
            sequence = self._waiting.popleft()
            sequence.ready = max(now - self._pace, sequence.arrived) + sequence.n_prompt / PREFILL
            self._running[sequence.request.id] = sequence
            started = Started(sequence.request.id, sequence.n_prompt, 0)
            if sequence.request.prompt == DEADLY:
                self._channel.send(started)
                os.kill(os.getpid(), signal.SIGSEGV)
            events.append(started)
        busy = len(self._running)
        n_tokens = 0
        for sequence in list(self._running.values()):
            if sequence.ready <= now:
                n_tokens += 1
                events += self._token(sequence, now)
        self._step += bool(n_tokens)
        return Step(events, self._stats(busy, n_tokens))

    def _token(self, sequence: Sequence, now: float) -> Events:
        request = sequence.request
        if not sequence.n_tokens:
            sequence.first = now
        sequence.n_tokens += 1
        text = f" {int(now * 1e9)}"
        logprobs = None if request.logprobs is None else [TokenLogprob(32, text.encode(), -1.0, [])]
        events: Events = [Delta(id=request.id, text=text, n_tokens=1, logprobs=logprobs)]
        if sequence.n_tokens >= sequence.limit:
            del self._running[request.id]
            events.append(
                Finished(
                    id=request.id,
                    reason="length",
                    prompt_tokens=sequence.n_prompt,
                    cached_tokens=0,
                    completion_tokens=sequence.n_tokens,
                    prompt_s=sequence.first - sequence.arrived,
                    decode_s=now - sequence.first,
                )
            )
        return events

    def _stats(self, busy: int, n_tokens: int) -> Stats:
        used = sum(one.n_prompt + one.n_tokens for one in self._running.values())
        return Stats(
            step=self._step,
            slots_busy=busy,
            waiting=len(self._waiting),
            parked=0,
            kv_used=used,
            kv_size=self._settings.parallel * self._settings.ctx_per_slot,
            batch_tokens=n_tokens,
            decode_s=self._pace if n_tokens else 0.0,
            sample_s=0.0,
            overhead_s=0.0,
            preemptions=0,
            cached_tokens=0,
            prompt_tokens=0,
        )


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    config = msgspec.json.decode(sys.argv[2], type=WorkerConfig)
    try:
        Paced(socket.socket(fileno=int(sys.argv[1])), config.settings).run()
    except Closed:
        return


if __name__ == "__main__":
    main()
