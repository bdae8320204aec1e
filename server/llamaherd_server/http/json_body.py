"""Decodes and validates request bodies without blocking the event loop for long.

The cost of a body is estimated before it is decoded, by counting strings, containers and values in its bytes. A large
body within these limits is decoded and validated on a thread, where it yields to the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from llamaherd_server.errors import ApiError
from llamaherd_server.http.error_responses import of_validation

T = TypeVar("T")

# These allow 4,096 messages of several parts, 2,048 inputs of 512 tokens, or 128 tools with large schemas.
MAX_STRINGS = 2**17  # including names of fields
MAX_CONTAINERS = 2**16  # objects and arrays
MAX_VALUES = 2**20
# Up to this size, decoding costs less than handing the body to a thread.
INLINE_BYTES = 2**15
_POOL = ThreadPoolExecutor(2, "json")


async def json_of(request: Request) -> Any:
    """Return the request's JSON body, decoded once. Raises a 400 if it is not valid JSON or too complex."""
    if not hasattr(request.state, "json"):
        request.state.json = await run_off_loop(request, partial(decode, await request.body()))
    return request.state.json


async def validated(request: Request, adapter: TypeAdapter[T]) -> T:
    """Return the request's body validated by `adapter`. Raises a 400 that names the first error."""
    value = await json_of(request)
    try:
        return await run_off_loop(request, partial(adapter.validate_python, value))
    except ValidationError as error:
        raise of_validation(error) from None


async def run_off_loop(request: Request, work: Callable[[], T]) -> T:
    """Return `work()`, whose cost grows with the body. Runs on a thread if the request's body is large."""
    return work() if len(await request.body()) <= INLINE_BYTES else await on_thread(work)


async def on_thread(work: Callable[[], T]) -> T:
    """Return `work()`, run on a thread."""
    return await asyncio.get_running_loop().run_in_executor(_POOL, work)


def decode(body: bytes) -> Any:
    """Decode a JSON text in UTF-8, with or without a BOM. Raises ApiError."""
    body = body.removeprefix(b"\xef\xbb\xbf")
    check_cost(body)
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None


def check_cost(body: bytes) -> None:
    """Raise a 400 for a JSON text that is too costly to decode."""
    if body.count(b'"') <= MAX_STRINGS and _containers(body) <= MAX_CONTAINERS and body.count(b",") <= MAX_VALUES:
        return
    # Strings may contain these characters: count again outside of strings.
    body = body.replace(rb"\\", b"").replace(rb"\"", b"")
    _check("strings", body.count(b'"') // 2, MAX_STRINGS)
    outside = b"".join(body.split(b'"')[::2])
    _check("objects and arrays", _containers(outside), MAX_CONTAINERS)
    _check("values", outside.count(b","), MAX_VALUES)


def _containers(body: bytes) -> int:
    return body.count(b"{") + body.count(b"[")


def _check(what: str, count: int, most: int) -> None:
    if count > most:
        message = f"the body has {count} {what}, more than {most}: send it in several requests"
        raise ApiError(400, message, code="body_too_complex")
