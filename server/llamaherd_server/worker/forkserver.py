"""Tokenises long texts and runs grammars in child processes, each forked for one request.

A grammar stays in its child as long as the request runs; it never enters the process that holds the model. If a child
exceeds its limits on time or memory, or llama.cpp aborts it, only its own request fails.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from contextlib import suppress

import msgspec

from llamaherd_server.process.priority import SLOW_S, Patience
from llamaherd_server.wire.errors import RequestError, too_long
from llamaherd_server.worker.channel import LENGTH_BYTES, frame

SHORT_CHARS = 2**13  # a text of this length is tokenised in 2 ms, and needs no child
MOST_TOKENS = 2**18  # that a tokenize request may return
# Tokens generated in the trial of a new grammar, which rejects a grammar that is slow from the start before the answer
# begins.
TRIAL_TOKENS = 3
# CPU time limit of a trial token, as a multiple of applying the simplest grammar to the whole vocabulary.
TRIAL_COST = 25.0
MEMORY_BYTES = 512 * 2**20
# Wall-clock limits, in case the host is busy: the longer one if the child got less than STARVED_CPU_S of CPU time.
GRAMMAR_DEADLINE_S, STARVED_DEADLINE_S = 3.0, 15.0
STARVED_CPU_S = 0.15
PID_BYTES = 4
MAX_KNOWN_GRAMMARS, MAX_KNOWN_CHARS = 256, 2**23
ALLOWED = b"\1"
# No devices: children do not need them, and GPU drivers do not survive a fork. No backtrace: ggml would attach a
# debugger to an aborting child, which takes seconds.
_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "HIP_VISIBLE_DEVICES": "",
    "GGML_VK_VISIBLE_DEVICES": "",
    "GGML_NO_BACKTRACE": "1",
}


class Job(msgspec.Struct, frozen=True):
    """Texts to tokenise, and a grammar to compile and try for `trial` tokens of at most `trial_cost` each.

    The tokens of the texts and `beside` others must fit into a slot of `room` tokens, or be at most `most`. With
    `counted`, only their number is returned.
    """

    texts: list[str] = []
    add_special: bool = False
    parse_special: bool = True
    room: int | None = None
    most: int | None = None
    counted: bool = False
    grammar: str | None = None
    trial: int = TRIAL_TOKENS
    trial_cost: float = TRIAL_COST
    beside: int = 0


class Prepared(msgspec.Struct):
    """The tokens of each text and their `count`, a lower bound if `at_least`; or why the grammar was rejected."""

    tokens: list[list[int]] = []
    count: int = 0
    at_least: bool = False
    refusal: str | None = None


_prepared = msgspec.msgpack.Decoder(Prepared)


class Forkserver:
    """Starts the process on first use, and again if it has died. Any thread may `open` a child."""

    def __init__(self, model_path: str) -> None:
        self._model_path = model_path
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._known: OrderedDict[str, RequestError | None] = OrderedDict()  # by grammar; None: it passed its trial

    def open(self, job: Job) -> Child:
        """Start a child for the job. Raises RequestError for a grammar that was rejected before."""
        with self._lock:
            if job.grammar is not None and job.grammar in self._known:
                if refusal := self._known[job.grammar]:
                    raise refusal
                job = msgspec.structs.replace(job, trial=0)
            ours, theirs = socket.socketpair()
            with theirs:
                try:
                    self._hand_over(theirs)
                except OSError:
                    self._end()
                    self._hand_over(theirs)
        return Child(self, job, ours)

    def has_passed(self, grammar: str) -> bool:
        """Whether the grammar has passed its trial."""
        with self._lock:
            return self._known.get(grammar, self) is None

    def remember(self, grammar: str, refusal: RequestError | None) -> None:
        """Record the result of a grammar's trial, so that it is rejected or accepted without one next time."""
        with self._lock:
            self._known[grammar] = refusal
            self._known.move_to_end(grammar)
            while len(self._known) > MAX_KNOWN_GRAMMARS or sum(map(len, self._known)) > MAX_KNOWN_CHARS:
                self._known.popitem(last=False)

    def close(self) -> None:
        with self._lock:
            self._end()

    def _hand_over(self, end: socket.socket) -> None:
        if self._control is None:
            self._start()
        assert self._control is not None  # noqa: S101 (started)
        socket.send_fds(self._control, [b"!"], [end.fileno()])

    def _start(self) -> None:
        self._control, theirs = socket.socketpair()
        module = "llamaherd_server.worker.forkserver_child"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno()), self._model_path],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **_ENVIRONMENT},
            )

    def _end(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Child:
    """A running child. One thread at a time may wait for it; any thread may `close` it, which fails the wait."""

    def __init__(self, server: Forkserver, job: Job, sock: socket.socket) -> None:
        self._server = server
        self._job = job
        self._socket = sock
        self._answer = bytearray()
        self._closed = False
        self._patience: Patience | None = None

    def prepared(self) -> Prepared:
        """Wait for the job's result. Raises RequestError, also if the grammar does not compile."""
        try:
            with suppress(BrokenPipeError, ConnectionResetError):  # it has died, which the next read notices
                self._socket.sendall(frame(self._job))
            pid = int.from_bytes(self._socket.recv(PID_BYTES), "little")
            if not pid:
                raise RequestError("internal", None, "cannot start a process for this request's texts or grammar")
            self._patience = Patience(pid)
            began = time.monotonic()
            while not self._readable(SLOW_S):
                deadline_s = GRAMMAR_DEADLINE_S if self._patience.used_s > STARVED_CPU_S else STARVED_DEADLINE_S
                if self._job.grammar is not None and time.monotonic() - began > deadline_s:
                    raise RequestError("invalid_grammar", "grammar", f"the grammar does not compile: {_OVER_LIMITS}")
            size = int.from_bytes(self._read(LENGTH_BYTES), "big")
            done = _prepared.decode(self._read(size))
        except (EOFError, OSError):
            raise self._refuse(_OVER_LIMITS) from None
        about, job = "at least " * done.at_least, self._job
        if job.room is not None and done.count >= job.room:
            raise too_long(done.count, job.room, about)
        if job.most is not None and done.count > job.most:
            message = f"the text has {about}{done.count} tokens, more than {job.most}: send it in parts"
            raise RequestError("invalid_value", "content", message)
        if done.refusal is not None:
            raise self._refuse(done.refusal)
        if self._job.grammar is not None and self._job.trial:
            self._server.remember(self._job.grammar, None)
        return done

    def ask(self, token: int) -> None:
        """Send `token` to the grammar, which accepts it if it is allowed; `answer` returns the result."""
        if self._patience:
            self._patience.again()
        self._send(token)

    def answer(self, n_vocab: int, wait_s: float) -> bytes | None:
        """ALLOWED, or a byte for each token of the vocabulary, 0 if allowed; None after `wait_s` without an answer.

        Raises RequestError.
        """
        try:
            while self._answer[:1] != ALLOWED and len(self._answer) < 1 + n_vocab:
                if not self._readable(wait_s):
                    return None
                if not (part := self._socket.recv(1 + n_vocab - len(self._answer))):
                    raise EOFError
                self._answer += part
        except (EOFError, OSError):
            message = f"the grammar takes too long for a token, or more than {MEMORY_BYTES >> 20} MiB: simplify it"
            raise RequestError("invalid_grammar", "grammar", message) from None
        whole, self._answer = bytes(self._answer), bytearray()
        return ALLOWED if whole[:1] == ALLOWED else whole[1:]

    def accept(self, token: int) -> None:
        """Continue with a token that the last answer allowed."""
        self._send(token)

    def close(self) -> None:
        """End the child and fail a pending wait."""
        self._closed = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the waiting thread
        self._socket.close()

    def _readable(self, wait_s: float) -> bool:
        try:
            ready = bool(select.select([self._socket], [], [], wait_s)[0])
        except ValueError:  # closed
            raise EOFError from None
        if not ready and self._patience:
            self._patience.look()
        return ready

    def _send(self, token: int) -> None:
        with suppress(OSError):  # it has died, which `answer` notices
            self._socket.sendall(token.to_bytes(4, "little"))

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self._socket.recv(min(size - len(data), 2**18))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    def _refuse(self, reason: str) -> RequestError:
        grammar = self._job.grammar
        if grammar is None:
            return RequestError("invalid_value", "prompt", f"the text cannot be tokenised: {reason}")
        refusal = RequestError("invalid_grammar", "grammar", f"the grammar does not compile: {reason}")
        if not self._closed:
            self._server.remember(grammar, refusal)
        return refusal


_OVER_LIMITS = f"it takes too much CPU time, more than {MEMORY_BYTES >> 20} MiB, or is nested too deeply: simplify it"
