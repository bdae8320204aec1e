"""Decodes multipart/form-data (RFC 7578) from a body in memory: split at the boundary, headers by the standard library.

Starlette's parser is for streams: it writes larger files to disk. A body here is bounded and complete in memory.
"""

from __future__ import annotations

from email.message import Message
from email.parser import HeaderParser

from llamaherd_server.errors import ApiError

MAX_PARTS, MAX_HEADER_BYTES, MAX_FIELD_BYTES = 64, 4096, 2**16


def decode_form(body: bytes, content_type: str) -> dict[str, str | bytes]:
    """Return the fields: text, or bytes for a part with a file name. Raises a 400 for other bodies and for repeats."""
    described = Message()
    described["content-type"] = content_type[:MAX_HEADER_BYTES]  # email's time grows with the square of the length
    boundary = described.get_boundary()
    if described.get_content_type() != "multipart/form-data" or not boundary:
        message = f"the body must be a form sent with Content-Type: multipart/form-data, not {content_type[:200]}"
        raise ApiError(400, message, code="invalid_content_type")
    delimiter = b"--" + boundary.encode(errors="surrogateescape")
    at = 0 if body.startswith(delimiter) else body.find(b"\r\n" + delimiter) + 2
    fields: dict[str, str | bytes] = {}
    while not body.startswith(b"--", at := at + len(delimiter)):
        end = body.find(b"\r\n" + delimiter, at)
        start = body.find(b"\r\n\r\n", at, min(at + MAX_HEADER_BYTES, end))
        if end < 0 or start < 0 or not body.startswith(b"\r\n", at):
            raise _invalid("it is incomplete, or a part has no headers or too long ones")
        if len(fields) == MAX_PARTS:
            raise _invalid(f"it has more than {MAX_PARTS} fields")
        name, value = _field(body[at + 2 : start], body, start + 4, end)
        if name in fields:
            raise ApiError(400, f"{name}: sent twice", param=name, code="invalid_value")
        fields[name] = value
        at = end + 2
    return fields


def _field(head: bytes, body: bytes, start: int, end: int) -> tuple[str, str | bytes]:
    headers = HeaderParser().parsestr(head.decode(errors="replace"))
    name = headers.get_param("name", header="content-disposition")
    if not isinstance(name, str) or headers.get_content_disposition() != "form-data":
        raise _invalid("a part has no name in its Content-Disposition")
    if headers.get_filename() is not None:
        return name, body[start:end]
    if end - start > MAX_FIELD_BYTES:
        raise ApiError(400, f"{name[:64]}: longer than {MAX_FIELD_BYTES} bytes", param=name[:64], code="invalid_value")
    try:
        return name, body[start:end].decode()
    except UnicodeDecodeError:
        raise ApiError(400, f"{name[:64]}: is not UTF-8", param=name[:64], code="invalid_value") from None


def _invalid(why: str) -> ApiError:
    return ApiError(400, f"the body is not valid multipart/form-data: {why}", code="invalid_form")
