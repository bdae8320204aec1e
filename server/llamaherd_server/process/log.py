"""Structured logs on stderr: JSON for the journal, readable lines on a terminal.

Logs never contain keys, and contain prompts and outputs only if log.texts is set.
"""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from typing import Any, TextIO, cast

import msgspec
import structlog


def configure() -> None:
    """Set up structlog, and route the warnings of uvicorn and other libraries through it."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, _renderer()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _Stderr())),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(_Stderr())
    formatter = structlog.stdlib.ProcessorFormatter
    steps = [formatter.remove_processors_meta, _renderer()]
    handler.setFormatter(formatter(processors=steps, foreign_pre_chain=shared))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)


class _Stderr:
    """Standard error as a file that never fails: a full disk must not fail the code that logs."""

    def write(self, text: str) -> None:
        with suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()


def _renderer() -> structlog.typing.Processor:
    if sys.stderr.isatty():
        return structlog.processors.KeyValueRenderer(key_order=["timestamp", "level", "event"], drop_missing=True)
    return structlog.processors.JSONRenderer(serializer=_json)


def _json(event: Any, **_: Any) -> str:
    return msgspec.json.encode(event, enc_hook=repr).decode()
