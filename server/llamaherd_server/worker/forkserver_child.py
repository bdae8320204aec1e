"""`python -m llamaherd_server.worker.forkserver_child FD MODEL`: forks a child for each socket received over FD.

It holds only the model's vocabulary, so a fork takes a millisecond. See forkserver.py.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import os
import random
import re
import resource
import signal
import socket
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import msgspec

from llamaherd_server.process.priority import lower
from llamaherd_server.worker.channel import LENGTH_BYTES, frame
from llamaherd_server.worker.forkserver import (
    ALLOWED,
    MEMORY_BYTES,
    PID_BYTES,
    Job,
    Prepared,
)
from llamaherd_server.worker.lib import load
from llamaherd_server.worker.vocabulary import Vocabulary

# CPU time limits, as multiples of applying the simplest grammar to the whole vocabulary: for compilation, per trial
# token, and the budget for an answer: its size, and its refill per token. A pattern for e-mail addresses takes 5.
COMPILE_COST, TRIAL_TOKEN_COST, ANSWER_COST, ANSWER_TOKEN_COST = 40.0, 8.0, 60.0, 6.0
MIN_COST_S = 0.005  # for small vocabularies
# CPU time limit for tokenising: a base, and an addition per MiB of text.
TEXTS_S, TEXTS_S_PER_MIB = 1.0, 4.0
REASON_CHARS = 200
PARSE_ERROR = b"error parsing grammar: "
LITERALS = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#.*')
# Size of a llama_token_data, and offset of its logit's last byte, which is 0 for 0.0 and 0xff for minus infinity.
CANDIDATE_BYTES, LOGIT_END = 12, 7
_job = msgspec.msgpack.Decoder(Job)


class Refused(Exception):
    """The grammar does not compile; the message says why."""


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    with ThreadPoolExecutor(1, initializer=lower) as executor:
        grammars = executor.submit(load_grammars, sys.argv[2]).result()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the children
    gc.freeze()
    while True:
        try:
            _, ends, _, _ = socket.recv_fds(control, 1, 1)
        except OSError:
            return
        if not ends:
            return
        with suppress(OSError):  # out of memory: the client sees its socket close
            if os.fork() == 0:
                control.close()
                run_child(grammars, socket.socket(fileno=ends[0]))
        os.close(ends[0])


def load_grammars(path: str) -> Grammars:
    """Load the vocabulary of the GGUF at `path`, and precompute what every grammar needs."""
    lib = load()
    last_error = bytearray()

    def write(level: int, text: bytes, _user_data: Any) -> None:
        last_error[:] = text if level == 4 else last_error

    callback = lib.llama_log_callback(write)
    lib.llama_log_set(callback, None)
    params = lib.llama_model_default_params()
    params.vocab_only, params.n_gpu_layers = True, 0
    handle = lib.llama_model_load_from_file(path.encode(), params)
    if not handle:
        sys.exit(f"{path}: the vocabulary cannot be loaded: {last_error.decode(errors='replace')}")
    vocabulary = Vocabulary(lib, handle)
    vocabulary.warm_up()
    return Grammars(vocabulary, last_error, callback)


def run_child(grammars: Grammars, end: socket.socket) -> NoReturn:
    """Do the job, then answer for its grammar, if any, until the other end closes."""
    try:
        end.send(os.getpid().to_bytes(PID_BYTES, "little"))
        job = _job.decode(_read(end, int.from_bytes(_read(end, LENGTH_BYTES), "big")))
        limit_resources(grammars.budget_s(job))
        end_when_closed(end, True)
        prepared = grammars.prepare(job)
        end_when_closed(end, False)
        end.sendall(frame(prepared))
        if job.grammar is not None and prepared.refusal is None:
            serve_grammar(grammars, end)
    except (EOFError, OSError):
        pass
    finally:
        os._exit(0)


def serve_grammar(grammars: Grammars, end: socket.socket) -> NoReturn:
    """Answer each received token within the CPU time budget; raises EOFError when the other end closes."""
    left_s = ANSWER_COST * grammars.cost_s
    while True:
        signal.setitimer(signal.ITIMER_PROF, 0)
        token = int.from_bytes(_read(end, 4), "little")
        left_s += ANSWER_TOKEN_COST * grammars.cost_s
        began = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, max(left_s, 1e-6))
        if answer := grammars.answer(token):
            end.sendall(answer)
        left_s = min(left_s - (time.process_time() - began), ANSWER_COST * grammars.cost_s)


def limit_resources(cpu_s: float) -> None:
    """Limit CPU time, beyond which SIGPROF ends the process, and memory, beyond which allocations fail."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, ValueError):  # not on macOS
        size = int(Path("/proc/self/statm").read_bytes().split()[0]) * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def end_when_closed(end: socket.socket, on: bool) -> None:
    """Set whether SIGIO ends this process when the other end closes, even in the middle of a llama.cpp call."""
    flags = fcntl.fcntl(end, fcntl.F_GETFL)
    fcntl.fcntl(end, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(end, fcntl.F_SETFL, flags | os.O_ASYNC if on else flags & ~os.O_ASYNC)


class Grammars:
    """Compiles and applies one grammar after the fork; tables of the vocabulary are built before the fork."""

    def __init__(self, vocabulary: Vocabulary, last_error: bytearray, writer: Any) -> None:
        """`last_error` holds llama.cpp's last error. The callback `writer` fills it, and must stay referenced."""
        self._lib = lib = vocabulary.lib
        self._writer = writer
        self._vocabulary = vocabulary
        self._last_error = last_error
        self._tree = prefix_tree(vocabulary)
        self._records = [bytes(lib.llama_token_data(token, 0.0, 0.0)) for token in range(vocabulary.n_vocab)]
        self._everything = b"".join(self._records)
        self._sampler: Any = None
        self._names_tokens = False  # whether the grammar names tokens, about which prefixes say nothing
        self._masked = False  # whether the next token comes from the mask of the last answer
        self.cost_s = self._measure_cost_s()

    def _measure_cost_s(self) -> float:
        """CPU time of applying a grammar that allows any text to the whole vocabulary."""
        self._compile("root ::= .*")
        times = []
        for _ in range(3):
            began = time.process_time()
            self._apply(self._everything)
            times.append(time.process_time() - began)
        self._lib.llama_sampler_free(self._sampler)
        return max(MIN_COST_S, min(times))

    def budget_s(self, job: Job) -> float:
        """The CPU time limit of the job."""
        texts_s = TEXTS_S + TEXTS_S_PER_MIB * sum(map(len, job.texts)) / 2**20 if job.texts else 0.0
        return texts_s + (COMPILE_COST + TRIAL_TOKEN_COST * job.trial) * self.cost_s * (job.grammar is not None)

    def prepare(self, job: Job) -> Prepared:
        prepared = self._tokenize(job)
        try:
            if job.grammar is not None:
                self._compile(job.grammar)
                if job.trial:
                    self._run_trial(job.trial, job.trial_cost * self.cost_s)
                    self._lib.llama_sampler_free(self._sampler)
                    self._compile(job.grammar)
        except Refused as refused:
            return Prepared(refusal=str(refused))
        return prepared

    def _tokenize(self, job: Job) -> Prepared:
        most = job.most if job.room is None else job.room - 1
        if most is not None:
            least = sum(
                self._vocabulary.least_tokens(text, most, parse_special=job.parse_special) for text in job.texts
            )
            if least + job.beside > most:
                return Prepared(count=least + job.beside, at_least=True)
        tokens = [
            self._vocabulary.tokenize(text, add_special=job.add_special, parse_special=job.parse_special)
            for text in job.texts
        ]
        count = sum(map(len, tokens)) + job.beside
        listed = not job.counted and (most is None or count <= most)
        return Prepared(tokens if listed else [], count)

    def answer(self, token: int) -> bytes | None:
        """ALLOWED if the grammar accepts `token`; else a mask, and None for the next `token`, chosen from the mask."""
        if self._masked:
            self._masked = False
            self._accept(token)
            return None
        if self._allows(token):
            self._accept(token)
            return ALLOWED
        self._masked = True
        return b"\0" + self._allowed()

    def _compile(self, grammar: str) -> None:
        """Compile the grammar. Raises Refused with the reason, which llama.cpp prints to stderr before the grammar."""
        self._names_tokens = any(mark in LITERALS.sub("", grammar) for mark in "<!")
        with temporary_file() as file:
            os.dup2(file.fileno(), 2)
            self._sampler = self._lib.llama_sampler_init_grammar(
                self._vocabulary.vocab, grammar.encode(errors="replace"), b"root"
            )
            if self._sampler:
                return
            file.seek(0)
            printed = file.read(4096)
        _, found, reason = printed.partition(PARSE_ERROR)
        text = (reason if found else bytes(self._last_error)).decode(errors="replace").partition("\n\n")[0]
        line = " ".join(text.split())
        raise Refused(line if len(line) <= REASON_CHARS else f"{line[:REASON_CHARS]}…")

    def _run_trial(self, tokens: int, token_s: float) -> None:
        """Accept random allowed tokens; raises Refused if one takes more than `token_s` seconds of CPU time."""
        rng = random.Random(0)  # noqa: S311 (any walk will do)
        for _ in range(tokens):
            began = time.process_time()
            allowed = [token for token, denied in enumerate(self._allowed()) if not denied]
            if not allowed or (token := rng.choice(allowed)) in self._vocabulary.eog_tokens:
                return
            self._accept(token)
            if time.process_time() - began > token_s:
                raise Refused(f"it takes more than {token_s:.2g} s of CPU time for a token: simplify it")

    def _allows(self, token: int) -> bool:
        return self._apply(self._records[token]) == b"\0"

    def _allowed(self) -> bytes:
        """A byte for each token, 0 if the grammar allows it."""
        if self._names_tokens:
            return self._apply(self._everything)
        forbidden = bytearray(b"\xff" * self._vocabulary.n_vocab)
        tokens = self._tree[None]
        while tokens:
            answers = self._apply(b"".join(map(self._records.__getitem__, tokens)))
            if tokens is self._tree[None] and 4 * answers.count(0) > len(tokens):
                return self._apply(self._everything)  # the tree would save little
            allowed = [token for token, denied in zip(tokens, answers, strict=True) if not denied]
            for token in allowed:
                forbidden[token] = 0
            tokens = [one for token in allowed for one in self._tree.get(token, ())]
        return bytes(forbidden)

    def _apply(self, records: bytes) -> bytes:
        """A byte for each llama_token_data in `records`, 0 if the grammar allows it."""
        data = bytearray(records)
        count = len(data) // CANDIDATE_BYTES
        first = (self._lib.llama_token_data * count).from_buffer(data)
        array = self._lib.llama_token_data_array(first, count, -1, False)
        self._lib.llama_sampler_apply(self._sampler, ctypes.byref(array))
        return bytes(memoryview(data)[LOGIT_END::CANDIDATE_BYTES])

    def _accept(self, token: int) -> None:
        self._lib.llama_sampler_accept(self._sampler, token)


def temporary_file() -> BinaryIO:
    """A temporary file, in memory where the system supports it: a busy disk would take seconds."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("printed"), "r+b")
    return tempfile.TemporaryFile()


def prefix_tree(vocabulary: Vocabulary) -> dict[int | None, list[int]]:
    """A prefix tree: maps each token to the tokens whose longest proper prefix it is, and None to those without one.

    A grammar that forbids a text forbids every text that starts with it. This does not hold for parts of characters,
    which are never prefixes here, nor for end-of-generation tokens, which neither have nor are prefixes.
    """
    pieces = vocabulary.pieces
    whole = {
        piece: token
        for token, piece in enumerate(pieces)
        if piece and token not in vocabulary.eog_tokens and is_utf8(piece)
    }
    longer: dict[int | None, list[int]] = {}
    for token, piece in enumerate(pieces):
        ends = () if token in vocabulary.eog_tokens else range(len(piece) - 1, 0, -1)
        beginnings = (whole.get(piece[:end]) for end in ends)
        longer.setdefault(next((one for one in beginnings if one is not None), None), []).append(token)
    return longer


def is_utf8(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


def _read(end: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = end.recv(min(size - len(data), 2**18))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


if __name__ == "__main__":
    main()
