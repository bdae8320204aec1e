"""The process in which untrusted chat templates are rendered; sandbox.py starts it.

A call is 4 bytes of length and a JSON object {"template", "context"}; its answer 4 bytes of length, "+" or "-", and
UTF-8 text.
Memory is bounded by RLIMIT_AS, time by an alarm: what is over either ends this process and nothing else.
"""

from __future__ import annotations

import datetime
import functools
import json
import resource
import signal
import sys
from contextlib import suppress
from typing import Any, BinaryIO, NoReturn

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 256 * 2**20
OUTPUT_CHARS = 8 * 2**20
TIME_S = 2.0


def main() -> None:
    """Answer calls until the other end closes."""
    with suppress(ValueError, OSError):  # macOS has no such limit; the alarm still bounds what a call can fill
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    calls, answers = sys.stdin.buffer, sys.stdout.buffer
    answers.write(b"!")  # the imports are done, the time of a call starts with the call
    answers.flush()
    while head := calls.read(4):
        call = json.loads(calls.read(int.from_bytes(head, "big")))
        signal.setitimer(signal.ITIMER_REAL, TIME_S)
        try:
            _answer(answers, b"+", render(**call))
        except MemoryError:
            _answer(answers, b"-", f"needs more than {MEMORY_BYTES} bytes of memory")
        except Exception as error:
            _answer(answers, b"-", str(error) or type(error).__name__)
        signal.setitimer(signal.ITIMER_REAL, 0)


def render(template: str, context: dict[str, Any]) -> str:
    """A chat template's prompt."""
    pieces, length = [], 0
    for piece in _compiled(template).generate(context):
        length += len(piece)
        if length > OUTPUT_CHARS:
            raise ValueError(f"the output is longer than {OUTPUT_CHARS} characters")
        pieces.append(piece)
    return "".join(pieces)


@functools.lru_cache(maxsize=4)
def _compiled(template: str) -> Template:
    # What transformers' apply_chat_template offers a template, which is what templates are written against.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().astimezone().strftime(pattern)


def _answer(answers: BinaryIO, status: bytes, text: str) -> None:
    body = status + text.encode(errors="replace")
    answers.write(len(body).to_bytes(4, "big") + body)
    answers.flush()


if __name__ == "__main__":
    main()
