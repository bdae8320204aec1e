"""Structured logs on stderr: JSON for the journal, readable lines on a terminal.

Never keys; prompts and outputs only where log.texts asks for them.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import msgspec
import structlog


def configure() -> None:
    """Set up structlog, and send what uvicorn and other libraries warn of the same way."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, _renderer()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    formatter = structlog.stdlib.ProcessorFormatter
    steps = [formatter.remove_processors_meta, _renderer()]
    handler.setFormatter(formatter(processors=steps, foreign_pre_chain=shared))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)


def _renderer() -> structlog.typing.Processor:
    if sys.stderr.isatty():
        return structlog.processors.KeyValueRenderer(key_order=["timestamp", "level", "event"], drop_missing=True)
    return structlog.processors.JSONRenderer(serializer=_json)


def _json(event: Any, **_: Any) -> str:
    return msgspec.json.encode(event, enc_hook=repr).decode()
