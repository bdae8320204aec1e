"""A process that may die: it runs functions of this package on untrusted input; pool.py starts it.

A frame is 4 bytes of length and a body. A call's body is a `Call` as JSON, an answer's is one byte and JSON: `+` and
the function's value, `-` and an `ApiError`'s fields, or `!` and the message of any other exception.
RLIMIT_AS bounds its memory and a timer the CPU time of a call: exceeding either ends this process and nothing else.
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
    """`function` is "module:name"; its one argument and its value are of the types that its annotations name."""

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
    """Import the modules named by the arguments, then answer calls until the other end closes."""
    for module in sys.argv[1:]:
        importlib.import_module(module)
    with suppress(ValueError, OSError):  # macOS has no such limit; the timer still bounds what a call can fill
        limit = _address_space() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    calls, answers = sys.stdin.buffer, sys.stdout.buffer
    _write(answers, b"")  # the imports are done: the time of a call starts with the call
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
    """The function that a `Call` names."""
    module, _, function = name.partition(":")
    found: Callable[[Any], Any] = getattr(importlib.import_module(module), function)
    return found


def decoded(raw: msgspec.Raw, function: Callable[[Any], Any]) -> Any:
    """A call's argument, in the type that the function takes."""
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
