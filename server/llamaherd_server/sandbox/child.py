"""An expendable process, started by pool.py, that runs functions of this package on untrusted input.

A frame is 4 bytes of length (big endian) and a body. A call's body is a `Call` as JSON. An answer's body is one byte
and data: `+` and the return value as JSON, `-` and an ApiError as JSON (`Refused`), or `!` and the message of any other
exception. RLIMIT_AS limits its memory and a timer the CPU time of each call; exceeding either ends only this process.
"""

from __future__ import annotations

import importlib
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, get_type_hints

import msgspec

from llamaherd_server.errors import ApiError

MEMORY_BYTES = 256 * 2**20


class Call(msgspec.Struct):
    """A call of `function` ("module:name") with one argument; its annotations give the types for decoding."""

    function: str
    cpu_s: float
    argument: msgspec.Raw


class Refused(msgspec.Struct):
    """An ApiError that the function raised."""

    status: int
    message: str
    code: str | None
    param: str | None


def main() -> None:
    """Import the modules given as arguments, then answer calls until the other end closes."""
    for module in sys.argv[1:]:
        importlib.import_module(module)
    with suppress(ValueError, OSError):  # macOS lacks this limit; there, only the timer bounds a call's memory
        limit = _address_space() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    calls, answers = sys.stdin.buffer, sys.stdout.buffer
    _write(answers, b"")  # signals the end of the imports, so that they do not count against the first call
    while head := calls.read(4):
        call = msgspec.json.decode(calls.read(int.from_bytes(head, "big")), type=Call)
        signal.setitimer(signal.ITIMER_PROF, call.cpu_s)
        try:
            function = function_named(call.function)
            answer = b"+" + msgspec.json.encode(function(decoded(call.argument, function)))
        except ApiError as error:
            answer = b"-" + msgspec.json.encode(Refused(error.status_code, error.detail, error.code, error.param))
        except MemoryError:
            answer = b"!" + f"needs more than {MEMORY_BYTES} bytes of memory".encode()
        except Exception as error:
            answer = b"!" + (str(error) or type(error).__name__).encode(errors="replace")
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(answers, answer)


def function_named(name: str) -> Callable[[Any], Any]:
    """Return the function named in a `Call`."""
    module, _, function = name.partition(":")
    found: Callable[[Any], Any] = getattr(importlib.import_module(module), function)
    return found


def decoded(raw: msgspec.Raw, function: Callable[[Any], Any]) -> Any:
    """Decode a call's argument to the type of the function's parameter."""
    [argument, *_] = get_type_hints(function).values()
    return msgspec.json.decode(raw, type=argument)


def _address_space() -> int:
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return 0


def _write(answers: BinaryIO, body: bytes) -> None:
    answers.write(len(body).to_bytes(4, "big") + body)
    answers.flush()


if __name__ == "__main__":
    main()
